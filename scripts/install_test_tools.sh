#!/usr/bin/env bash
# Debian's packages that some tests need, if they are missing: without them those tests are skipped (in CI they fail).
set -euo pipefail
# The browser is for the accuracy report.
packages=(cmake g++ doctest-dev clang-tidy chromium fonts-dejavu-core)
test "$(uname -m)" = x86_64 && packages+=(g++-aarch64-linux-gnu qemu-user)
missing=()
for package in "${packages[@]}"; do
    dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
test ${#missing[@]} -eq 0 && exit 0
echo "installing ${missing[*]}"
apt-get update --quiet=2
DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends "${missing[@]}" >/dev/null
