#!/usr/bin/env bash
# The first step of first_quarter_hour.sh: unpacks what was carried (.gpukit by gpukit/pack.sh, .gpuextras by
# pack_extras.py) into $GPUKIT_SITE. On a machine where everything is installed there is nothing to do.
set -euo pipefail
site=${GPUKIT_SITE:-/tmp/gpukit_site}
shopt -s nullglob
parts=(.gpukit/t*-*)
if ((${#parts[@]} == 0)); then
  if [[ -f $site/.env ]]; then echo "unpacked before: $site"; else echo "no kit was carried: what is installed is used"; fi
  exit 0
fi
bash "${parts[0]}/unpack.sh" "${parts[@]}" >/dev/null
for wheel in .gpuextras/*.whl; do
  "${PYTHON:-python3}" -m zipfile -e "$wheel" "$site"
done
# The package isn't installed there: by this vLLM's processes still find its plugin.
"${PYTHON:-python3}" - "$site" <<'PY'
import pathlib, sys, tomllib
project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
folder = pathlib.Path(sys.argv[1]) / "rlaif_ray-0.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text("Metadata-Version: 2.1\nName: rlaif-ray\nVersion: 0\n")
groups = project["entry-points"]
lines = [line for name, points in groups.items() for line in (f"[{name}]", *(f"{k} = {v}" for k, v in points.items()))]
(folder / "entry_points.txt").write_text("\n".join(lines) + "\n")
PY
echo "unpacked ${#parts[@]} parts of the kit and $(find .gpuextras -name '*.whl' 2>/dev/null | wc -l) more wheels into $site"
