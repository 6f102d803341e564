#!/usr/bin/env bash
# Fuzzes the runtime through its C API: fuzz.sh CORPUS SECONDS [libFuzzer option ...]
# CORPUS is a directory of small files, which grows; `uv run python packages/kernels/cpp/fuzz/corpus.py CORPUS` writes some.
# Needs clang with libFuzzer (Debian: clang-19 libclang-rt-19-dev); CLANGXX names another one. Inputs that fail stay in CORPUS/../crashes.
set -euo pipefail
(($# >= 2)) || { echo "usage: fuzz.sh CORPUS SECONDS [libFuzzer option ...]" >&2; exit 2; }
corpus=$1 seconds=$2
shift 2
cpp=$(cd "$(dirname "$0")/.." && pwd)
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
mkdir -p "$corpus/../crashes"
# Without the instruction sets that need flags of their own: what is fuzzed is the reading, on the scalar kernels.
mapfile -t sources < <(ls "$cpp"/capi/*.cpp "$cpp"/runtime/*.cpp "$cpp"/ternary/*.cpp | grep -Ev '/([a-z_]+_)?(avx[a-z0-9]*|amx|neon|dotprod|i8mm)\.cpp$')
"${CLANGXX:-clang++-19}" -std=c++20 -O2 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -ffp-contract=off -pthread \
  -I "$cpp" "$cpp/fuzz/gguf_fuzz.cpp" "${sources[@]}" -o "$build/fuzz"
# Keys and values of a long context are allocated at once, but take no memory until they are written: only what is used is limited.
export WF_THREADS=1 ASAN_OPTIONS=allocator_may_return_null=1:max_allocation_size_mb=8192
time "$build/fuzz" -max_total_time="$seconds" -max_len=200000 -rss_limit_mb=2048 -malloc_limit_mb=1000000 -timeout=20 -print_final_stats=1 \
  -artifact_prefix="$corpus/../crashes/" "$@" "$corpus"
