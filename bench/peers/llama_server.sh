#!/bin/sh
# llama_server.sh [DIR]: builds llama.cpp's llama-server for this machine and prints its path; ten minutes or more, once.
#
# The sources are those in the source package of llama-cpp-python on PyPI, the version bench/peers/compare.py measures;
# they go to DIR (build/llama-server). Without a web page and TLS. JOBS=N: compile so many files at once.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
dir=${1:-$root/build/llama-server}
version=$(sed -n 's/^VERSION = "\(.*\)"$/\1/p' "$root/bench/peers/compare.py")
program=$dir/$version/bin/llama-server
if [ ! -x "$program" ]; then
    mkdir -p "$dir/$version"
    {
        python3 -m pip download -q --no-deps --no-binary :all: -d "$dir" \
            "llama-cpp-python==$version"
        tar xzf "$dir/llama_cpp_python-$version.tar.gz" -C "$dir"
        cmake -S "$dir/llama_cpp_python-$version/vendor/llama.cpp" -B "$dir/$version" -G Ninja \
            -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=ON -DLLAMA_OPENSSL=OFF \
            -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
        nice cmake --build "$dir/$version" --target llama-server -j "${JOBS:-$(nproc)}"
    } >&2
fi
echo "$program"
