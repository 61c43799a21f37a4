#!/usr/bin/env bash
# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#
# wheels.sh COMPILER FOLDER: a consumer against the CUDA headers of the wheels, as a machine without a CUDA Toolkit gets
# them. Exits with 77 where there is no pip or no package index answers.
compiler=$1 folder=$2
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/lib.sh"

requirements=$root/scripts/cccl-requirements.txt
mkdir -p "$folder"
if ! cmp -s "$requirements" "$folder/wheels/requirements.txt"; then
    if ! python3 -m pip --version >/dev/null 2>&1; then
        say "skipped: python3 has no pip"
        exit 77
    fi
    status=0
    fetch_wheels "$requirements" "$folder/wheels" "$cccl_file" || status=$?
    if ((status == no_index)); then
        say "skipped: PyPI does not answer; $folder/wheels/pip.log says more"
        exit 77
    fi
    ((status == 0)) || die "fetching the wheels ended with $status"
fi
headers=$folder/wheels/nvidia/cu13/include
[[ $("$compiler" -std=c++20 -I include -I "$headers" -I "$headers/cccl" -M test/consume/main.cpp) == *"$headers/cccl/cuda/std/"* ]] ||
    die "the compiler does not read the headers of the wheels"
"$compiler" -std=c++20 -O1 -Wall -Wextra -Werror -I include -I "$headers" -I "$headers/cccl" test/consume/main.cpp \
    -o "$folder/consumer" -pthread
"$folder/consumer"
