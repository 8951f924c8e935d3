#!/usr/bin/env bash
# Finds or installs what Packhorse needs and builds its native library. ./packhorse sources this
# file; the Makefile and deno.json's tasks run it:
#
#   tools/bootstrap.sh setup            Debian packages, Deno and npm packages, where missing
#   tools/bootstrap.sh build            the native library into build/; the CUDA one too if there
#                                       are nvcc and a GPU
#   tools/bootstrap.sh cuda             both native libraries; needs nvcc, not a GPU
#   tools/bootstrap.sh bundle           the browser code of reports into build/report_page/
#   tools/bootstrap.sh native-test      the native tests of the last build
#   tools/bootstrap.sh sanitize         native tests under address and undefined-behaviour sanitizers
#   tools/bootstrap.sh deno ARGUMENTS   runs Deno
#
# CUDA_ARCHITECTURES overrides the GPU architectures that `cuda` compiles for. Nothing is written to
# standard output, except by what `deno` runs.
set -euo pipefail

root=$(readlink -f -- "${BASH_SOURCE[0]}")
root=${root%/*/*}

DENO_VERSION=2.9.6

say() { printf 'packhorse: %s\n' "$*" >&2; }
fail() { say "$@" && exit 1; }
has() { command -v "$1" >/dev/null; }

# need COMMAND:PACKAGE...  Installs the Debian packages of the commands that are missing.
need() {
  local missing=() each
  for each in "$@"; do has "${each%:*}" || missing+=("${each#*:}"); done
  ((${#missing[@]} == 0)) && return
  if ((EUID != 0)) || ! has apt-get; then
    fail "missing ${missing[*]}; install them with: sudo apt-get install ${missing[*]}"
  fi
  say "installing ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  { apt-get -qq update && apt-get -qq install --no-install-recommends "${missing[@]}"; } >&2 ||
    fail "cannot install ${missing[*]}: apt-get failed"
}

# Sets DENO to a Deno of at least version 2.9 from PATH, or to the one in .deno/; false without either.
find_deno() {
  local pattern='^deno ([0-9]+)\.([0-9]+)'
  if DENO=$(command -v deno) && [[ $("$DENO" --version) =~ $pattern ]] &&
    ((BASH_REMATCH[1] > 2 || (BASH_REMATCH[1] == 2 && BASH_REMATCH[2] >= 9))); then
    return 0
  fi
  # npm may be set not to run install scripts, without which the package's own launcher fails.
  local architecture=${HOSTTYPE/x86_64/x64}
  DENO=$root/.deno/node_modules/@deno/linux-${architecture/aarch64/arm64}-glibc/deno
  [[ -x $DENO ]]
}

ensure_deno() {
  find_deno && return
  need npm:npm
  say "installing Deno $DENO_VERSION into .deno/"
  npm install --prefix "$root/.deno" --no-audit --no-fund --loglevel=error "deno@$DENO_VERSION" >&2 ||
    fail "cannot install Deno: npm failed"
  find_deno || fail "cannot find Deno for $HOSTTYPE after installing it from npm"
}

setup() {
  need cmake:cmake ninja:ninja-build g++:g++
  ensure_deno
  "$DENO" install --quiet --config "$root/deno.json" >&2
  # Only the tests that open reports need it, and they say so.
  (need chromium:chromium) || say "going on without Chromium: tests that open reports will fail"
}

# Makes nvcc known to CMake; false if there is none.
find_nvcc() {
  has nvcc && return
  [[ -x /usr/local/cuda/bin/nvcc ]] && export CUDACXX=/usr/local/cuda/bin/nvcc
}

has_gpu() { compgen -G '/dev/nvidia[0-9]*' >/dev/null; }

# cmake_build FOLDER OPTIONS...
cmake_build() {
  need cmake:cmake ninja:ninja-build g++:g++
  cmake -S "$root/cuda" -B "$root/$1" -G Ninja --log-level=WARNING "${@:2}" >&2
  cmake --build "$root/$1" >&2
}

build() {
  if find_nvcc && has_gpu; then cuda; else cmake_build build -DCMAKE_BUILD_TYPE=Release; fi
}

cuda() {
  find_nvcc || fail "cannot build for CUDA: nvcc is neither on PATH nor in /usr/local/cuda/bin"
  cmake_build build -DCMAKE_BUILD_TYPE=Release -DPACKHORSE_CUDA=ON \
    ${CUDA_ARCHITECTURES:+"-DCMAKE_CUDA_ARCHITECTURES=$CUDA_ARCHITECTURES"}
}

# esbuild looks for npm packages in node_modules/, which Deno makes of what it has cached.
bundle() {
  ensure_deno
  "$DENO" run --quiet --config "$root/deno.json" --node-modules-dir=auto --allow-read --allow-env \
    --allow-run --allow-write="$root/build" "$root/tools/bundle.ts" >&2
}

native_test() { ctest --test-dir "$root/${1:-build}" --output-on-failure >&2; }

sanitize() {
  cmake_build build/sanitize -DPACKHORSE_SANITIZE=ON
  native_test build/sanitize
}

run_deno() {
  ensure_deno
  cd "$root" && exec "$DENO" "$@"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  case ${1:-} in
    setup | build | cuda | bundle | sanitize) "$1" ;;
    native-test) native_test ;;
    deno) run_deno "${@:2}" ;;
    *) fail "cannot run \"${1:-}\": expected setup, build, cuda, bundle, native-test, sanitize or deno" ;;
  esac
fi
