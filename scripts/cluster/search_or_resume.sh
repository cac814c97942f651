#!/bin/bash
# Begins a study, or goes on with it where it is there already: what a job that may be started again runs.
#   search_or_resume.sh SPACE.yaml RUNS NAME [options of `ranksearch search`]      RUNS: the folder of the studies, on shared storage
set -euo pipefail
space=${1:?usage: search_or_resume.sh SPACE.yaml RUNS NAME [options]} runs=${2:?} study=${3:?}
shift 3
if [ -f "$runs/$study/study.json" ]; then
  exec ranksearch resume "$study" --runs "$runs" --address auto
fi
exec ranksearch search "$space" --name "$study" --runs "$runs" --address auto "$@"
