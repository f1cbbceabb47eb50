#!/bin/sh
# Keeps a shard folder and a model up to date with a folder of documents. For cron:
#
#   15 3 * * *  /path/to/nightly.sh /srv/inbox /srv/model
#
# Runs as often as you like: what is finished is not done again, what was interrupted continues, and
# two runs at the same time do not disturb each other. Silent unless something fails.
set -eu
[ $# -eq 2 ] || { echo "usage: nightly.sh INBOX HOME" >&2; exit 2; }
inbox=$1
home=$2
steps=${STEPS:-200}
mkdir -p "$home"

exec 9> "$home/lock"
flock -n 9 || exit 0

# Names and contents: a document that changed is a new state of the folder.
today=$(cd "$inbox" && find . -type f -exec cksum {} + | sort | cksum | cut -d' ' -f1)
shards=$home/shards-$today
if [ ! -e "$shards/manifest.json" ]; then
  gemtool tokenize -q --keep-going "$inbox" |
    gemtool pack -q --length "${LENGTH:-1024}" |
    gemtool shard -q -f -o "$shards"
fi
gemtool train -q --data "$shards" --model "${MODEL:-nano}" --steps "$steps" \
  --ckpt "$home/run-$today" --resume >> "$home/metrics-$today.jsonl"
ln -sfn "run-$today" "$home/current"
