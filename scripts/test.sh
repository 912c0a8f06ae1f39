#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Set up what is missing, then check the style and run the whole suite.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

msa-online get-models face_landmarker all-MiniLM-L6-v2 whisper-tiny.en-encoder dlib-face-resnet
make quality test
