# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
# shellcheck shell=bash
#
# What the scripts share; for bash, to be sourced. Sets `root` and goes there.
#
#   ensure_packages [package...]             Debian packages for building, and those named
#   ensure_clang                             clang++ and its sanitizers, besides
#   ensure_cccl                              CUDA's headers, from the toolkit or from wheels
#   ensure_disassembler                      cuobjdump, likewise
#   configure_and_build preset [target...]   the preset's build directory, up to date
#
# Environment:
#   FASTMOE_COMPILER_OPTIONS  what g++ or clang++ gets besides, a list of CMake's
#   FASTMOE_HIDE_CUDA=1   behave as on a machine without a CUDA Toolkit
#   FASTMOE_JOBS=n        compile n files at a time

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
logs=$root/build/log

build_packages=(g++ cmake ninja-build libdnnl-dev libopenmpi-dev openmpi-bin doctest-dev libbenchmark-dev nlohmann-json3-dev libcli11-dev
    python3)

say() { printf '%s\n' "$*"; }
die() {
    printf '%s\n' "$*" >&2
    exit 1
}

# run_step "What it does" command...: one line and the time it took; the command's output goes to a file, and its end is
# shown if the command fails, or `advice` in its place if there is any. When a person watches, the seconds count up while
# it runs.
run_step() {
    local title=$1 name start=$SECONDS status=0 watcher=
    shift
    name=$(tr -cs 'a-zA-Z0-9\n' '-' <<<"$title")
    mkdir -p "$logs"
    local log=$logs/$name.log
    if [[ -t 1 ]]; then
        while kill -0 $$ 2>/dev/null; do # ends with this script, however that ends
            printf '\r%s ... %d s ' "$title" $((SECONDS - start))
            sleep 1
        done &
        watcher=$!
    fi
    "$@" >"$log" 2>&1 </dev/null || status=$?
    if [[ -n $watcher ]]; then
        kill "$watcher" 2>/dev/null || true
        wait "$watcher" 2>/dev/null || true
        printf '\r\033[K'
    fi
    if ((status != 0)) && [[ -n ${advice:-} ]]; then
        printf '%s\n' "$title: failed after $((SECONDS - start)) s; $log says more." "" "$advice" >&2
        exit "$status"
    elif ((status != 0)); then
        say "$title: failed after $((SECONDS - start)) s. The end of $log:" >&2
        tail -n 40 "$log" >&2
        exit "$status"
    fi
    say "$title: $((SECONDS - start)) s"
}

# Runs a command as root, or says in its return value that it cannot.
as_root() {
    if ((EUID == 0)); then
        "$@"
    elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
        sudo -n "$@"
    else
        return 126
    fi
}

may_be_root() { ((EUID == 0)) || { command -v sudo >/dev/null && sudo -n true 2>/dev/null; }; }

package_is_there() {
    case $1 in # a tool may well come from somewhere else
    g++ | cmake | python3 | clang) command -v "${1/clang/clang++}" >/dev/null && return 0 ;;
    ninja-build) command -v ninja >/dev/null && return 0 ;;
    esac
    [[ $(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null) == installed ]]
}

ensure_packages() {
    local package missing=()
    if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
        say "This is not a Debian machine. Needed are what Debian calls: ${build_packages[*]} $*"
        return
    fi
    for package in "${build_packages[@]}" "$@"; do
        package_is_there "$package" || missing+=("$package")
    done
    if ((${#missing[@]} > 0)); then
        may_be_root || die "Some packages are missing, and this user may not install them. Please run

    sudo apt-get install --no-install-recommends ${missing[*]}

and start this script again."
        run_step "Package lists" as_root apt-get -o DPkg::Lock::Timeout=300 update
        run_step "Installing ${missing[*]}" as_root env DEBIAN_FRONTEND=noninteractive \
            apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "${missing[@]}"
    fi
    local version
    version=$(cmake --version | sed -n '1s/[^0-9]*\([0-9.]*\).*/\1/p')
    [[ $(printf '%s\n' 3.25 "$version" | sort -V | head -n 1) == 3.25 ]] ||
        die "CMake is $version; 3.25 or newer is needed."
}

ensure_clang() {
    ensure_packages clang
    # Debian recommends what the sanitizers link, and no more than that.
    local version
    version=$(clang++ -dumpversion)
    clang++ -fsanitize=address,undefined -x c++ -o /dev/null - <<<'int main() {}' 2>/dev/null || ensure_packages "libclang-rt-${version%%.*}-dev"
}

# The toolkit's header directory, if there is a toolkit that is new enough.
toolkit_include() {
    [[ ${FASTMOE_HIDE_CUDA:-0} == 1 ]] && return
    local directory nvcc
    nvcc=$(command -v nvcc || true)
    for directory in "${CUDAToolkit_ROOT:-}" "${CUDA_PATH:-}" "${CUDA_HOME:-}" \
        ${nvcc:+"$(dirname "$(dirname "$(readlink -f "$nvcc")")")"} /usr/local/cuda; do
        if [[ -n $directory && -e $directory/include/cccl/cuda/std/mdspan ]]; then
            say "$directory/include"
            return
        fi
    done
}

# Sets cccl_settings, which CMake gets.
ensure_cccl() {
    cccl_settings=("-DFASTMOE_CCCL_INCLUDE_DIR=")
    [[ -n $(toolkit_include) ]] && return 0

    local wheels=$root/build/cccl requirements=$root/scripts/cccl-requirements.txt
    if ! cmp -s "$requirements" "$wheels/requirements.txt"; then
        python3 -m pip --version >/dev/null 2>&1 || ensure_packages python3-pip
        local advice="This machine has no CUDA Toolkit of version 13, whose headers are needed (a GPU is not), and the headers
alone could not be had from PyPI. Please do one of these, and start this script again:

  - install the CUDA Toolkit 13.0 or newer, and name it with CUDAToolkit_ROOT if it is not in /usr/local/cuda;
  - let this machine reach PyPI (https_proxy and pip's own settings are heeded);
  - on a machine that reaches it, run

        python3 -m pip download --no-deps --only-binary=:all: --require-hashes -r scripts/cccl-requirements.txt -d wheels

    bring the folder here, and set PIP_NO_INDEX=1 and PIP_FIND_LINKS=wheels."
        run_step "CUDA's headers, from wheels" fetch_wheels "$requirements" "$wheels" "$cccl_file"
    fi
    cccl_settings=("-DFASTMOE_CCCL_INCLUDE_DIR=$wheels/nvidia/cu13/include/cccl" -DFASTMOE_ENABLE_CUDA=OFF)
}

# Of the wheels with CUDA's headers, what has to be there.
cccl_file=nvidia/cu13/include/cccl/cuda/std/mdspan
# The exit status of fetch_wheels where no package index answers.
no_index=75

# Sets disassembler_settings, which CMake gets: nothing where the toolkit has cuobjdump, or where it cannot be had.
disassembler_settings=()
ensure_disassembler() {
    command -v "$(dirname "$(readlink -f "$(command -v nvcc)")")/cuobjdump" >/dev/null && return 0
    command -v cuobjdump >/dev/null && return 0
    local wheels=$root/build/disassembler requirements=$root/scripts/disassembler-requirements.txt
    if ! cmp -s "$requirements" "$wheels/requirements.txt"; then
        python3 -m pip --version >/dev/null 2>&1 || ensure_packages python3-pip
        if ! fetch_wheels "$requirements" "$wheels" nvidia/cu13/bin/nvdisasm >/dev/null 2>&1; then
            say "There is no cuobjdump: device.main_loop is skipped."
            return 0
        fi
        chmod +x "$wheels"/nvidia/cu13/bin/*
    fi
    disassembler_settings=("-DFASTMOE_CUOBJDUMP=$wheels/nvidia/cu13/bin/cuobjdump")
}

# fetch_wheels list folder file: downloads what is pinned, checks it, and unpacks it, the file among it; the copy of the list beside
# it says that all is there.
fetch_wheels() {
    local requirements=$1 wheels=$2 status=0
    rm -rf "$wheels"
    mkdir -p "$wheels/download"
    python3 -m pip download --no-deps --only-binary=:all: --require-hashes --disable-pip-version-check --no-input --retries 2 \
        -r "$requirements" -d "$wheels/download" 2>&1 | tee "$wheels/pip.log" || status=$?
    if ((status != 0)); then
        grep -qE "Retrying \(Retry|from versions: none" "$wheels/pip.log" && return "$no_index"
        return "$status"
    fi
    for wheel in "$wheels"/download/*.whl; do
        python3 -m zipfile -e "$wheel" "$wheels" || return
    done
    rm -r "$wheels/download" "$wheels/pip.log"
    [[ -e $wheels/$3 ]] || return
    cp "$requirements" "$wheels/requirements.txt"
}

# As many as there are processors, and no more than memory allows at 1.5 GB for a compiler.
job_count() {
    local processors memory
    processors=$(nproc)
    memory=$(awk '/^MemAvailable:/ { print int($2 / 1500000) }' /proc/meminfo 2>/dev/null || echo "$processors")
    ((memory < 1)) && memory=1
    say "${FASTMOE_JOBS:-$((processors < memory ? processors : memory))}"
}

# What CMake is told besides the preset: by ensure_cccl, and by a script that wants more.
cccl_settings=("-DFASTMOE_CCCL_INCLUDE_DIR=")
cmake_settings=()

configure_and_build() {
    local preset=$1 start=$SECONDS
    shift
    local build=(cmake --build --preset "$preset" -j "$(job_count)")
    (($# > 0)) && build+=(--target "$@")
    # A cache that was made with other headers would mix the two.
    local cache=$root/build/$preset/CMakeCache.txt fresh=()
    if [[ -e $cache ]] && ! grep -qxF -- "${cccl_settings[0]/#-DFASTMOE_CCCL_INCLUDE_DIR=/FASTMOE_CCCL_INCLUDE_DIR:PATH=}" "$cache"; then
        fresh=(--fresh)
    fi
    run_step "Configuring $preset" cmake --preset "$preset" "${fresh[@]}" "${cccl_settings[@]}" "${cmake_settings[@]}" \
        "-DFASTMOE_COMPILER_OPTIONS=${FASTMOE_COMPILER_OPTIONS:-}"
    if [[ -t 1 ]]; then
        # Ninja itself shows how far it is, on one line.
        NINJA_STATUS="Building $preset: %f of %t, %e s  " "${build[@]}" </dev/null || die "Building $preset failed."
        say "Building $preset: $((SECONDS - start)) s"
    else
        run_step "Building $preset" "${build[@]}"
    fi
}
