#!/bin/sh
# Run a command with a container engine where there is none, and no registry: as root, with
# debootstrap and a mirror of Debian's packages.
#
#     scripts/debian_engine.sh FOLDER make image-check
#
# FOLDER gets a Debian with Podman and Compose (0.6 GB, once), its images, and a base image with
# Python to build on, localhost/debian-python:SUITE, in which the certificates that this machine
# trusts are trusted. The command finds `docker` and `docker-compose`, and in its environment
# DOCKER_HOST, BASE, and MORE, a compose file with what has to differ from docker-compose.yml here.
# In the end the engine, its containers and networks are gone; remove FOLDER when you need it no
# more.
#
# BASE_SUITE: the release of Debian that the base image is of; bookworm has Python 3.11 and trixie,
# which is taken unless set, 3.13.
set -eu
[ $# -ge 2 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mkdir -p "$1"
folder=$(cd "$1" && pwd)
shift
suite=${BASE_SUITE:-trixie}
engine=$folder/engine base=$folder/base-$suite.tar
programs=podman,buildah,runc,catatonit,netavark,aardvark-dns,nftables,docker-cli,docker-compose

if [ ! -e "$engine/made" ]; then
    rm -rf "$engine"
    debootstrap --variant=minbase --include="ca-certificates,$programs" trixie "$engine"
    touch "$engine/made"
fi
if [ ! -e "$base" ]; then
    made=$(mktemp -d "$folder/base.XXXXXX")
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv "$suite" "$made"
    ln -sf python3 "$made/usr/bin/python"
    cp /etc/ssl/certs/ca-certificates.crt "$made/etc/ssl/certs/"
    printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n' >"$made/etc/pip.conf"
    rm -rf "$made"/var/cache/apt/archives/*.deb "$made"/var/lib/apt/lists/*
    tar -C "$made" --numeric-owner -cf "$base.partial" .
    rm -rf "$made"
    mv "$base.partial" "$base"
fi

mkdir -p "$engine/etc/containers" "$engine/$folder" "$folder/bin"
cp /etc/resolv.conf "$engine/etc/"
# Limits that a root without every capability may set, too.
cat >"$engine/etc/containers/containers.conf" <<END
[containers]
default_ulimits = ["nofile=$(ulimit -Hn):$(ulimit -Hn)", "nproc=32768:32768"]
[engine]
cgroup_manager = "cgroupfs"
runtime = "runc"
events_logger = "file"
END
cat >"$engine/etc/containers/storage.conf" <<END
[storage]
driver = "overlay"
graphroot = "$folder/storage"
runroot = "/run/containers/storage"
END
echo '{"default": [{"type": "insecureAcceptAnything"}]}' >"$engine/etc/containers/policy.json"
# Podman has no log driver `local`; the build shares the machine's network, as its indexes of
# packages may be there.
cat >"$folder/more.yml" <<END
services:
  cpu: {logging: {driver: json-file}, build: {network: host}}
  gpu: {logging: {driver: json-file}, build: {network: host}}
END
# The programs of that Debian, with its libraries.
for program in docker docker-compose; do
    printf '#!/bin/sh\nexec %s --library-path %s %s "$@"\n' "$engine"/lib64/ld-linux-*.so.* \
        "$(echo "$engine"/usr/lib/*-linux-gnu)" "$engine/usr/bin/$program" >"$folder/bin/$program"
    chmod +x "$folder/bin/$program"
done

# A chroot does not do: containers are made with pivot_root, which needs a root that is a mount.
# With their own process ids, all that the engine has started ends when it does.
enter() {
    exec unshare --mount --propagation private --pid --fork --kill-child sh -euc '
        root=$0 folder=$1
        shift
        mount --bind "$root" "$root"
        mount -t proc proc "$root/proc"
        for place in sys dev; do mount --rbind "/$place" "$root/$place"; done
        mount -t tmpfs tmpfs "$root/run"
        mount --rbind "$folder" "$root/$folder"
        cd "$root"
        mkdir -p before
        pivot_root . before
        umount -l /before
        exec "$@"' "$engine" "$folder" "$@"
}

socket=$folder/podman.sock
clean() {
    for one in $(docker ps --all --quiet); do docker rm --force "$one" >/dev/null; done
    docker network prune --force >/dev/null
    kill -KILL "$service" 2>/dev/null || true # unshare leaves SIGTERM to its child
    wait "$service" 2>/dev/null || true
    rm -f "$socket"
}
rm -f "$socket"
enter catatonit -- podman system service --time 0 "unix://$socket" >"$folder/service.log" 2>&1 &
service=$!
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
until [ -S "$socket" ]; do
    kill -0 "$service" 2>/dev/null || { cat "$folder/service.log" >&2; exit 1; }
    sleep 0.2
done
export PATH="$folder/bin:$PATH" DOCKER_HOST="unix://$socket" DOCKER_BUILDKIT=0
export BASE="localhost/debian-python:$suite" MORE="$folder/more.yml"
docker image inspect "$BASE" >/dev/null 2>&1 || docker import "$base" "$BASE" >/dev/null
"$@"
