#!/bin/sh
# Installs chord-rl's units, its user and a configuration to begin with; run as root, and as often as you like.
#
#     install.sh [--build VENV | --program VENV] [--gpu]
#     install.sh uninstall
#
# --build VENV    make a virtual environment from this checkout first (takes a package index and a few minutes); where
#                 there is nvidia-smi it gets the GPU build of vLLM, as with --gpu, else the CPU build
# --program VENV  put the commands of an existing one into PREFIX/bin: which version runs is which one is linked
# --gpu           let the units reach NVIDIA GPUs
#
# PREFIX (/usr/local) is where commands and units go. With DESTDIR all goes below that folder, and nothing of the running
# system is touched. Files in /etc/chord-rl that are there already are kept, by uninstall too, unless nobody has changed them.
set -eu
umask 022

here=$(cd "$(dirname "$0")" && pwd)
root=${DESTDIR:-}
prefix=${PREFIX:-/usr/local}
units=$root$prefix/lib/systemd/system
users=$root$prefix/lib/sysusers.d/chord-rl.conf
bin=$root$prefix/bin
etc=$root/etc/chord-rl
gpu=$root/etc/systemd/system/chord-.service.d/gpu.conf
state=$root/var/lib/chord-rl
commands="chord-learner chord-actor chord-eval chord-expert chord-keys chord-audit chord-report chord-local"
services="chord-learner.service chord-actor@.service chord-eval.service"

fail() {
    echo "install.sh: $1" >&2
    exit 2
}

on_this_system() { # run a command unless a folder stands in for the system
    [ -n "$root" ] || "$@"
}

on_a_booted_system() { # what asks systemd itself, which an image that is being built does not run
    [ -n "$root" ] || [ ! -d /run/systemd/system ] || "$@"
}

is_hidden() { # from the units, by their sandbox
    case $1 in
        /home/* | /root/* | /run/user/* | /tmp/*) true ;;
        *) false ;;
    esac
}

check_place() {
    ! is_hidden "$1" || fail "$option: got $1, expected a folder that the sandbox can see, such as /opt/chord-rl/0.1.0"
    case $1 in
        /*) ;;
        *) fail "$option: got $1, expected an absolute path" ;;
    esac
}

check_python() { # a virtual environment is a link to a Python that lies elsewhere
    python=$(readlink -f "$root$1/bin/python" || true)
    [ -z "$root" ] || python=${python#"$(readlink -f "$root")"}
    ! is_hidden "$python" || fail "$option: $1 runs $python, expected a Python that the sandbox can see, such as /usr/bin/python3"
}

build() {
    [ -z "$root" ] || fail "--build: got DESTDIR, expected it without: build VENV first, then give --program"
    extra=cpu
    [ -z "$has_gpu" ] || extra=gpu
    python3 -m venv "$1"
    check_python "$1"
    # As the Makefile does: torch first and exactly, on without vLLM, and no torchvision that does not fit.
    "$1/bin/python" -m pip install --quiet torch==2.13.0
    "$1/bin/python" -m pip install --quiet "$here/../..[$extra,demo]" || {
        echo "vLLM does not install here: going on without it, actors will use the transformers engine"
        "$1/bin/python" -m pip install --quiet "$here/../..[demo]"
    }
    "$1/bin/python" -W ignore -c "import torchvision" 2> /dev/null ||
        "$1/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
}

link_commands() {
    [ -x "$root$1/bin/chord-learner" ] || fail "--program: got $1, expected a virtual environment with bin/chord-learner"
    check_python "$1"
    mkdir -p "$bin"
    for command in $commands; do
        ln -sfn "$1/bin/$command" "$bin/$command"
    done
}

install_units() {
    mkdir -p "$units/chord-.service.d" "$(dirname "$users")"
    for unit in $services; do
        sed "s|=/usr/local/bin/|=$prefix/bin/|" "$here/$unit" > "$units/$unit"
    done
    cp "$here/chord.target" "$here/chord.slice" "$units/"
    cp "$here/chord-.service.d/10-common.conf" "$units/chord-.service.d/"
    cp "$here/sysusers.conf" "$users"
    on_this_system systemd-sysusers "$users"
}

install_configuration() {
    # Secret keys are root's (systemd hands them on); which public keys are allowed, the learner reads while it runs.
    mkdir -p "$etc/keys/allowed" "$state/models" "$state/learner"
    chmod 0711 "$etc/keys"
    chmod 0700 "$state/learner"
    on_this_system chown chord-rl: "$state/learner"
    for file in run.toml environment; do
        [ -e "$etc/$file" ] || cp "$here/etc/$file" "$etc/$file"
    done
    if [ -n "$has_gpu" ]; then
        mkdir -p "$(dirname "$gpu")"
        [ -e "$gpu" ] || cp "$here/gpu.conf" "$gpu"
    fi
}

remove_unchanged() { # $1, where it is still what $2 brought
    if [ -e "$1" ] && cmp -s "$1" "$2"; then rm "$1"; fi
}

remove_empty() {
    for folder in "$@"; do
        rmdir "$folder" 2> /dev/null || true
    done
}

uninstall() {
    program=$(readlink "$bin/chord-learner" || true)
    if [ -e "$units/chord.target" ]; then
        on_a_booted_system systemctl stop chord.target "chord-*.service"
        # shellcheck disable=SC2086
        systemctl ${root:+"--root=$root"} --quiet disable chord.target $services
    fi
    for unit in $services chord.target chord.slice chord-.service.d/10-common.conf; do
        rm -f "$units/$unit"
    done
    rm -f "$users"
    for command in $commands; do
        [ ! -L "$bin/$command" ] || rm "$bin/$command"
    done
    remove_unchanged "$gpu" "$here/gpu.conf"
    for file in run.toml environment; do
        remove_unchanged "$etc/$file" "$here/etc/$file"
    done
    remove_empty "$units/chord-.service.d" "$(dirname "$gpu")" "$etc/keys/allowed" "$etc/keys" "$etc" \
        "$state/learner" "$state/models" "$state"
    on_a_booted_system systemctl daemon-reload
    stays=""
    for folder in "$etc" "$state" "$root/var/cache/chord-rl" ${program:+"$root${program%/bin/*}"}; do
        [ ! -e "$folder" ] || stays="$stays $folder,"
    done
    if [ -z "$root" ] && id chord-rl > /dev/null 2>&1; then stays="$stays the user chord-rl,"; fi
    echo "removed${stays:+; what is yours stays:${stays%,}}"
}

venv="" option="" has_build="" has_gpu="" verb=install
while [ $# -gt 0 ]; do
    case $1 in
        --build | --program)
            [ $# -gt 1 ] || fail "$1: got no folder, expected one"
            [ "$1" = --program ] || has_build=yes
            option=$1
            venv=$2
            shift
            ;;
        --gpu) has_gpu=yes ;;
        uninstall) verb=uninstall ;;
        -h | --help)
            sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
            exit
            ;;
        *) fail "got $1, expected --build VENV, --program VENV, --gpu or uninstall" ;;
    esac
    shift
done

[ -n "$root" ] || [ "$(id -u)" = 0 ] || fail "got user $(id -un), expected root, or DESTDIR"
if [ $verb = uninstall ]; then
    uninstall
    exit
fi
[ -z "$venv" ] || check_place "$venv"
if [ -n "$has_build" ]; then
    ! command -v nvidia-smi > /dev/null || has_gpu=yes
    build "$venv"
fi
[ -z "$venv" ] || link_commands "$venv"
install_units
install_configuration
on_a_booted_system systemctl daemon-reload
echo "installed: units in $units, configuration in $etc"
