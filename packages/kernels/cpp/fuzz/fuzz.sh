#!/usr/bin/env bash
# Fuzzes the GGUF reader and the loader of models: fuzz.sh CORPUS SECONDS [libFuzzer option ...]
# CORPUS is a directory of small files, which grows (`python -c "from bitnet_arch.gguf.fuzz import write_corpus; write_corpus('CORPUS')"`
# writes some). Needs clang with libFuzzer (Debian: clang-19 libclang-rt-19-dev); CLANGXX names another one.
set -euo pipefail
(($# >= 2)) || { echo "usage: fuzz.sh CORPUS SECONDS [libFuzzer option ...]" >&2; exit 2; }
corpus=$1 seconds=$2
shift 2
cpp=$(cd "$(dirname "$0")/.." && pwd)
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
# Without the instruction sets that need flags of their own: what is fuzzed is the reading, on the scalar kernels.
mapfile -t sources < <(ls "$cpp"/runtime/*.cpp "$cpp"/ternary/*.cpp | grep -Ev '/([a-z]+_)?(avx[a-z0-9]*|neon|dotprod|i8mm)\.cpp$')
"${CLANGXX:-clang++-19}" -std=c++20 -O2 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -ffp-contract=off -pthread \
  -I "$cpp" "$cpp/fuzz/gguf_fuzz.cpp" "${sources[@]}" -o "$build/fuzz"
"$build/fuzz" -max_total_time="$seconds" -max_len=200000 -rss_limit_mb=2048 -timeout=10 -print_final_stats=1 "$@" "$corpus"
