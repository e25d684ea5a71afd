# Sourced by the other scripts: makes the virtual environments, once.
#
# make_venv FOLDER REQUIREMENTS [PACKAGE...] creates FOLDER if it is not there
# and installs the requirements and the packages (editable). A stamp for each file of
# requirements makes the next call return at once.

fail() {
  echo "error: $*" >&2
  exit 1
}

# A Python 3.11 or 3.12: $PYTHON, or the first of the usual names.
find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or 3.12 found (tried: ${PYTHON:-python3 python3.12 python3.11}). Install one, or name it: PYTHON=/path/to/python bash $0"
}

make_venv() {
  local folder=$1 requirements=$2 python asked stamp
  shift 2
  asked="$(cat "$requirements" setup.py runtime/pyproject.toml | cksum) $*"
  stamp=$folder/.stamp-$requirements
  if [ "$(cat "$stamp" 2>/dev/null)" = "$asked" ]; then
    echo "== $folder is up to date"
    return
  fi
  python=$(find_python) || exit 1
  echo "== making $folder with $("$python" --version), from $requirements"
  [ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
    -r "$requirements" || fail "the packages of $requirements could not be installed (above is why); run the same command again to go on"
  if [ $# -gt 0 ]; then
    local package editable=()
    for package in "$@"; do editable+=(-e "$package"); done
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
      --no-deps "${editable[@]}" || fail "could not install: $*"
  fi
  echo "$asked" >"$stamp"
}
