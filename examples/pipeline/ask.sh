#!/bin/sh
# Asks the same questions of every document of a folder, each prefilled only once:
#
#   ask.sh CKPT FOLDER questions.txt > answers.jsonl
#
# A context file stays beside each document; a document is run through the model again only when it
# is newer than its context.
set -eu
[ $# -eq 3 ] || { echo "usage: ask.sh CKPT FOLDER questions.txt" >&2; exit 2; }
ckpt=$1
folder=$2
questions=$3

for document in "$folder"/*; do
  case $document in *.ctx) continue ;; esac
  context=$document.ctx
  if [ ! -e "$context" ] || [ "$document" -nt "$context" ]; then
    gemtool tokenize -q --for "$ckpt" "$document" | gemtool prefill -q -f --ckpt "$ckpt" -o "$context"
  fi
  jq -cR --arg doc "$document" '{id: ($doc + ": " + .), prompt: .}' "$questions" |
    gemtool decode -q --ckpt "$ckpt" --cache "$context" --prompts - \
      --max-tokens "${MAX_TOKENS:-48}" --format jsonl
done
