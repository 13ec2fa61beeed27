#!/usr/bin/env bash
# The one door: makes the environment where none is active, then runs `python -m trainer VERB ...`.
#   ./launch.sh                      the whole story on the default recipe: data, training, evaluation, report
#   ./launch.sh VERB [ARGUMENTS]     see ./launch.sh --help
#   ./launch.sh test [ARGUMENTS]     the test suite
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
extras=""
[[ "${1:-}" == test ]] && extras="[dev]"

# Sets $python. Installs at the first call and when pyproject.toml changed; a stamp says what was installed.
find_environment() {
    if [[ -n "${VIRTUAL_ENV:-}" ]] && compgen -G "$VIRTUAL_ENV/lib/python3*/site-packages/ostinato-*.dist-info" >/dev/null; then
        python=$VIRTUAL_ENV/bin/python
        return
    fi
    local environment=$root/.venv
    python=$environment/bin/python
    local stamp="$environment/installed$extras" wanted
    wanted=$(cksum <"$root/pyproject.toml")
    if [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]]; then
        return
    fi
    local base=${PYTHON:-python3}
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "launch.sh: $base is missing or older than Python 3.10; set PYTHON=/path/to/python" >&2
        exit 2
    fi
    # One installation at a time, also when several ranks or hosts share this folder.
    exec 9>"$root/.venv.lock"
    flock 9
    if [[ ! -f "$stamp" || "$(<"$stamp")" != "$wanted" ]]; then
        echo "launch.sh: installing into .venv (once, some minutes)" >&2
        if [[ ! -x "$python" ]] && ! "$base" -m venv "$environment"; then
            echo "launch.sh: $base cannot make a virtual environment; install its venv module (Debian: python3-venv)" >&2
            exit 2
        fi
        "$python" -m pip install --quiet --disable-pip-version-check -e "$root$extras" >&2
        printf '%s\n' "$wanted" >"$stamp"
        [[ -n "$extras" ]] && printf '%s\n' "$wanted" >"$environment/installed"
    fi
    exec 9>&-
}

# Arguments before the verb belong to it: ./launch.sh --hosts FILE train CONFIG
leading=()
while [[ "${1:-}" == --hosts || "${1:-}" == --node ]]; do
    leading+=("$1" "${2:?launch.sh: $1 needs a value}")
    shift 2
done

find_environment
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

case "${1:-}" in
"")
    config=speech/read_ru
    "$python" -m trainer prepare "$config"
    "$python" -m trainer train "$config" nproc=2
    "$python" -m trainer evaluate "${config/\//-}"
    exec "$python" -m trainer report "${config/\//-}"
    ;;
test)
    shift
    cd "$root"
    exec "$python" -m pytest "$@"
    ;;
-h | --help | help)
    exec "$python" -m trainer --help
    ;;
*)
    verb=$1
    shift
    exec "$python" -m trainer "$verb" "$@" "${leading[@]}"
    ;;
esac
