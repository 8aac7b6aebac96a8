# Sourced by the other launchers: sets $root and $python, and gives install_fmjax.
# FMJAX_PYTHON names the interpreter to build .venv with; pip's own settings (PIP_*, pip.conf) are honoured.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
python=$venv/bin/python

find_python() {
    local name
    if [ -n "${FMJAX_PYTHON:-}" ]; then
        set -- "$FMJAX_PYTHON"
    else
        set -- python3.13 python3.12 python3.11 python3
    fi
    for name; do
        # Run it: a name on the path can be a shim of a version that is not there, or lack venv's parts.
        if "$name" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$name"
            return
        fi
    done
    echo "fmjax needs Python 3.11 or newer with venv (on Debian: python3-venv); tried: $*." \
        "Install one, or set FMJAX_PYTHON to its path." >&2
    return 1
}

# install_fmjax EXTRAS: .venv with `.[EXTRAS]` (comma separated, may be empty). A stamp makes a second call instant.
install_fmjax() {
    local base hash stamp=$venv/.fmjax-${1:-core}
    hash=$(cd "$root" && { pwd && cat pyproject.toml constraints.txt; } | cksum)  # the path: a copied .venv is stale
    if [ -x "$python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$hash" ]; then
        return
    fi
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        base=$(find_python) || return
        echo "fmjax: making $venv with $base" >&2
        "$base" -m venv "$venv" || return
    fi
    echo "fmjax: installing${1:+ with extras $1} (about a minute the first time)" >&2
    "$python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt" -e "$root${1:+[$1]}" || return
    echo "$hash" >"$stamp"
}
