# Sourced by quickstart.sh and test.sh: a virtual environment in the checkout with the package installed editable.
# setup EXTRA installs `.[EXTRA]`; it is fast when the same pyproject.toml was installed before.
setup() {
    local extra="${1:-}" python="${PYTHON:-python3}" mark
    cd "$(dirname "${BASH_SOURCE[0]}")/.." || return 1
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "error: Python 3.11 or newer is needed, $python is $("$python" --version 2>&1); set PYTHON=" >&2
        return 1
    fi
    # Named after what was installed, so that a changed pyproject.toml or a moved checkout is installed again.
    mark=".venv/installed-${extra:-core}-$( (pwd; cat pyproject.toml) | cksum | cut -d' ' -f1)"
    if [ ! -f "$mark" ]; then
        echo "setting up .venv (once)" >&2
        [ -x .venv/bin/python ] || "$python" -m venv .venv || return 1
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}" || return 1
        touch "$mark"
    fi
    # Nothing is asked of a server unless the user names something on it.
    export HF_HUB_DISABLE_TELEMETRY=1
}
