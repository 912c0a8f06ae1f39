#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Set up what is missing, then check the style and run the whole suite.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# `msa-online serve` is tested in a browser. Without the right to install it, that test fails and says what to do.
if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then
    sudo=$([ "$(id -u)" = 0 ] || echo "sudo -n")
    $sudo apt-get -qq update || true
    $sudo apt-get -qq install -y --no-install-recommends chromium chromium-driver >/dev/null || true
fi

msa-online get-models face_landmarker all-MiniLM-L6-v2 whisper-tiny.en-encoder dlib-face-resnet
make quality test
