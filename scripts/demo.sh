#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The main job from end to end on data the project brings itself: render a corpus of talking clips, train on the raw
# clips, score the checkpoint with all modalities and with each alone, and predict from one raw clip.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

step=""
say() {
    if [ -n "$step" ]; then printf -- '-- took %d s: %s\n' $((SECONDS - began)) "$step"; fi
    step="$*" began=$SECONDS
    printf '\n== %s\n' "$step"
}

say "1/5 pretrained models"
msa-online get-models face_landmarker all-MiniLM-L6-v2

say "2/5 a synthetic corpus of talking clips (made once)"
msa-online synthesize runs/demo_corpus

say "3/5 training from the raw clips, and the test split under seven modality conditions"
accelerate launch --quiet --config_file configs/accelerate/cpu.yaml train.py configs/demo.yaml training.overwrite=true

say "4/5 what is inside the checkpoint"
msa-online describe runs/demo

say "5/5 predictions from raw clips of the test split, by the reloaded checkpoint"
read -r clip text < <(python - <<'PYTHON'
import csv
rows = csv.DictReader(open("runs/demo_corpus/metadata.csv", encoding="utf-8"))
row = next(row for row in rows if row["split"] == "test" and row["text"] and float(row["label"]) > 1)
print(f"runs/demo_corpus/{row['file_name']}", row["text"])
PYTHON
)
echo "clip: $clip"
echo "text: $text"
msa-online predict "$clip" --text "$text" --model runs/demo
msa-online predict "$clip" --model runs/demo
say "done in $SECONDS s"
