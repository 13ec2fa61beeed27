#!/usr/bin/env bash
# The one door: makes the environment where none is active, then runs `python -m trainer VERB ...`.
#   ./launch.sh                      the whole story on the default recipe: data, training, evaluation, report
#   ./launch.sh VERB [ARGUMENTS]     see ./launch.sh --help
#   ./launch.sh test [ARGUMENTS]     the test suite
#   sbatch -N2 launch.sh train ...   the same as a job of Slurm, which reads the next lines; see docs/launch.md
#SBATCH --job-name=ostinato --requeue --open-mode=append --signal=TERM@120
set -euo pipefail

say() { echo "launch.sh: $*" >&2; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ ! -f "$root/pyproject.toml" && -n "${SLURM_SUBMIT_DIR:-}" ]]; then # sbatch runs a copy of this file
    root=$SLURM_SUBMIT_DIR
    if [[ ! -f "$root/launch.sh" ]]; then
        say "$root is not the project's folder: go there, then sbatch launch.sh $*"
        exit 2
    fi
fi
extras=""
[[ "${1:-}" == test ]] && extras="[dev]"

# Sets $python. Installs into .venv at the first call, and when what an installation depends on has changed: a stamp
# says what was installed. Another active environment that has ostinato in it belongs to the user and is used as it is.
find_environment() {
    local environment=$root/.venv active=${VIRTUAL_ENV:-}
    if [[ -n "$active" && ! "$active" -ef "$environment" ]] &&
        compgen -G "$active/lib/python3*/site-packages/ostinato-*.dist-info" >/dev/null; then
        python=$active/bin/python
        if [[ -n "$extras" ]] && ! compgen -G "$active/lib/python3*/site-packages/pytest" >/dev/null; then
            say "$active has no pytest; install the extra: $python -m pip install -e '$root$extras'"
            exit 2
        fi
        return
    fi
    python=$environment/bin/python
    local stamp="$environment/installed$extras" wanted
    # The dependencies, and the sources that are compiled.
    wanted=$(cd "$root" && shopt -s globstar nullglob && cksum pyproject.toml setup.p[y] kernels/**/*.{cpp,h,cu})
    if [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]]; then
        return
    fi
    local base=${PYTHON:-python3}
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        say "$base is missing or older than Python 3.10; set PYTHON=/path/to/python"
        exit 2
    fi
    # One installation at a time, also when several ranks or hosts share this folder.
    exec 9>"$root/.venv.lock"
    flock 9
    if [[ ! -f "$stamp" || "$(<"$stamp")" != "$wanted" ]]; then
        say "installing into .venv (once, some minutes)"
        # One that was interrupted, or made without its module ensurepip, is there and has no pip.
        if { [[ ! -x "$python" ]] && ! "$base" -m venv "$environment" >&2; } ||
            { ! "$python" -m pip --version && ! "$python" -m ensurepip; } >/dev/null 2>&1; then
            say "$base cannot make a virtual environment; install its venv module (Debian: python3-venv)"
            exit 2
        fi
        "$python" -m pip install --quiet --disable-pip-version-check -e "$root$extras" >&2
        printf '%s\n' "$wanted" >"$stamp"
        [[ -z "$extras" ]] || printf '%s\n' "$wanted" >"$environment/installed"
    fi
    exec 9>&-
}

# Arguments before the verb belong to it: ./launch.sh --hosts FILE train CONFIG
leading=()
while [[ "${1:-}" == --hosts || "${1:-}" == --node ]]; do
    if [[ $# -lt 2 ]]; then
        say "$1 needs a value, as in: ./launch.sh --hosts FILE train CONFIG"
        exit 2
    fi
    leading+=("$1" "$2")
    shift 2
done

find_environment
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONSAFEPATH=1 # from Python 3.11 on, a trainer.py in the user's folder is not taken for ours

case "${1:-}" in
"")
    exec "$python" -m trainer story speech/read_ru nproc=2
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
