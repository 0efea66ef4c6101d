# Sourced by the entry scripts, which stand in the project's root: a virtual environment in .venv, and Debian packages.

# Install Debian packages, if this is a Debian whose administrator we are; otherwise say what is missing and go on.
apt_install() {
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        echo "missing: install these Debian packages or their like: $*" >&2
        return 0
    fi
    echo "installing: $*" >&2
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq update >&2
    apt-get -qq install --yes --no-install-recommends "$@" >/dev/null
}

# Print the first Python that is new enough and can make virtual environments.
find_python() {
    local python
    for python in ${PYTHON:-} python3 python3.11 python3.12 python3.13 python3.14 /usr/bin/python3; do
        if "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$python"
            return 0
        fi
    done
    return 1
}

# prepare_venv [EXTRA]: make .venv with nbdq in it, editable; do nothing if that was done since pyproject.toml changed.
prepare_venv() {
    local extra=${1:-} stamp python
    stamp=.venv/ready${extra:+-$extra}
    if [ -e "$stamp" ] && [ ! pyproject.toml -nt "$stamp" ]; then
        return 0
    fi
    if ! python=$(find_python); then
        apt_install python3 python3-venv
        python=$(find_python) || { echo "needs Python 3.11 or newer with its venv module" >&2; return 1; }
    fi
    echo "preparing .venv with $("$python" --version)" >&2
    "$python" -m venv .venv
    .venv/bin/python -m pip --disable-pip-version-check --no-input install -qq --root-user-action=ignore \
        --editable ".${extra:+[$extra]}"
    touch "$stamp"
}
