# Sourced by the other scripts: makes virtual environments.
#
# make_venv FOLDER REQUIREMENTS [PACKAGE...] makes FOLDER unless it is there, and installs
# the requirements and the packages (editable) into it. A stamp per requirements file lets
# the next call return at once; a call that failed or was interrupted can be repeated.

fail() {
  echo "error: $*" >&2
  exit 1
}

# The first supported Python of $PYTHON or the usual names; nothing if there is none.
find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.12 python3.13 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
}

# Makes an environment with pip in it, by venv or by uv.
new_environment() {
  local folder=$1 python
  python=$(find_python)
  rm -rf "$folder"
  if [ -n "$python" ] && "$python" -m venv "$folder"; then
    return
  fi
  rm -rf "$folder"
  if command -v uv >/dev/null; then
    uv venv --quiet --seed --python "${python:-3.12}" "$folder" || fail "uv could not make $folder (see above)"
  elif [ -n "$python" ]; then
    fail "$python cannot make virtual environments (see above). On Debian and Ubuntu: apt install python3-venv. Anywhere: pip install uv, then run this again"
  else
    fail "needs Python 3.11, 3.12 or 3.13; tried ${PYTHON:-python3, python3.12, python3.13, python3.11}. Either pip install uv (it brings Python 3.12) and run this again, or name one: PYTHON=/path/to/python"
  fi
}

make_venv() {
  local folder=$1 requirements=$2 wanted stamp package editable=()
  shift 2
  wanted="$(cat "$requirements" setup.py runtime/pyproject.toml | cksum) $*"
  stamp=$folder/.stamp-$requirements
  if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    echo "== $folder is up to date"
    return
  fi
  # Without a working pip it was only half made.
  "$folder/bin/python" -m pip --version >/dev/null 2>&1 || new_environment "$folder"
  echo "== installing $requirements into $folder ($("$folder/bin/python" --version))"
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements" ||
    fail "could not install $requirements (see above); run the same command again to retry"
  for package in "$@"; do editable+=(-e "$package"); done
  if [ $# -gt 0 ]; then
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "${editable[@]}" ||
      fail "could not install: $*"
  fi
  echo "$wanted" >"$stamp"
}
