#!/usr/bin/env bash
# Submits a job for each incomplete stage of /TMP/run, unless its job already runs or waits.
# A job starts when the jobs it depends on have succeeded, and is removed when one of them fails.
set -euo pipefail
cd /TMP/run

# Inherited variables of an allocation or a rank would override the size, GPUs and ranks of the jobs.
inherited='^((SLURM|SBATCH|PMIX?|TORCHELASTIC)_.*|((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|CUDA_VISIBLE_DEVICES)$'
for name in $(compgen -e | grep -E "$inherited" | grep -vxE '(SLURM_(CONF|CLUSTERS)|SBATCH_(ACCOUNT|PARTITION|QOS|RESERVATION))'); do
  unset "$name"
done

prefer_script() { # STAGE: a user's SBATCH_ACCOUNT would override the account in the script
  local option
  for option in account partition qos reservation; do
    if grep -q "^#SBATCH --${option}[= ]" "$1/job.sbatch"; then unset "SBATCH_${option^^}"; fi
  done
}

if [ "${1:-}" = --test-only ]; then # prints when Slurm could start each job; submits nothing
  for stage in import_hf prepare_data score cache_logits prune distill evaluate export_hf report ; do
    echo "$stage $( (prefer_script "$stage"; sbatch --test-only "$stage/job.sbatch") 2>&1 | tail -n 1)" || true
  done
  exit
fi

state() { # STAGE JOB: prints the state of a job in the queue; another cluster may have other jobs with this id
  squeue --noheader --format=%T --name="run.$1.HASH" --jobs="$2" 2>/dev/null || true
}

owner=$(id -u)@$(scontrol show config 2>/dev/null | sed -n 's/^ClusterName *= //p') || true

submit() { # STAGE FINGERPRINT DEPENDENCY: prints the job's id and records it for `launch/run.py status`
  local job deadline=$((SECONDS + 300))
  job=$(grep -s "^$1 .* $2 HASH\$" jobs.txt | tail -n 1 | cut -d " " -f 2) || true
  while [ -n "$job" ] && [ "$(state "$1" "$job")" = COMPLETING ]; do # ends soon, such as after scancel
    if [ "$SECONDS" -ge "$deadline" ]; then
      echo "Slurm does not end job $job of $1, which is completing; repeat this later" >&2
      return 1
    fi
    sleep 2
  done
  if [ -n "$job" ] && [ -n "$(state "$1" "$job")" ]; then
    echo "$job" # submitted before
    return
  fi
  prefer_script "$1"
  job=$(sbatch --parsable --kill-on-invalid-dep=yes --dependency="$3" "$1/job.sbatch") || return
  job=${job%%;*}
  echo "$1 $job $owner $2 HASH" >>jobs.txt || { # such as a full disk; bash ignores `set -e` here
    scancel "$job"
    return 1
  }
  echo "$job"
}

# singleton: only one job of a name runs at a time, so that no two jobs write to one stage
job_import_hf=$(submit import_hf FINGERPRINT "singleton")
job_prepare_data=$(submit prepare_data FINGERPRINT "afterok:$job_import_hf,singleton")
job_score=$(submit score FINGERPRINT "afterok:$job_import_hf:$job_prepare_data,singleton")
job_cache_logits=$(submit cache_logits FINGERPRINT "afterok:$job_import_hf:$job_prepare_data,singleton")
job_prune=$(submit prune FINGERPRINT "afterok:$job_import_hf:$job_score,singleton")
job_distill=$(submit distill FINGERPRINT "afterok:$job_cache_logits:$job_prepare_data:$job_prune,singleton")
job_evaluate=$(submit evaluate FINGERPRINT "afterok:$job_distill:$job_import_hf:$job_prepare_data:$job_prune,singleton")
job_export_hf=$(submit export_hf FINGERPRINT "afterok:$job_distill:$job_evaluate:$job_import_hf:$job_prepare_data,singleton")
job_report=$(submit report FINGERPRINT "afterok:$job_distill:$job_evaluate:$job_export_hf:$job_import_hf:$job_prepare_data:$job_prune,singleton")
echo "import_hf $job_import_hf" "prepare_data $job_prepare_data" "score $job_score" "cache_logits $job_cache_logits" "prune $job_prune" "distill $job_distill" "evaluate $job_evaluate" "export_hf $job_export_hf" "report $job_report"
