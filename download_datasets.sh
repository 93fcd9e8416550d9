#!/usr/bin/env bash
# Fetch the data sets of the experiments into data/, or into another folder. Every file is checked against the size and
# sha256 in utils/data/datasets.tsv; what is there is kept, and what was interrupted goes on.
#   bash download_datasets.sh                      # all: 400 MB, of which GLUE's MNLI has 313
#   bash download_datasets.sh gsm8k arithmetic     # some: gsm8k, arithmetic, wikitext-2, glue, or a part such as glue/RTE
#   bash download_datasets.sh --check              # only say what is there, without a network
#   data_dir=FOLDER bash download_datasets.sh
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
data_dir=${data_dir:-$root/data}
table=$root/utils/data/datasets.tsv

stop() {
    echo "error: $1" >&2
    exit "${2:-2}"
}

# What is wrong with the file $1, which should have $2 bytes and the checksum $3 (`-`: unknown). Nothing if it is whole.
fault_of() {
    local size
    size=$(wc -c < "$1")
    if [[ "$2" != - && "$size" -ne "$2" ]]; then
        echo "has $size bytes instead of $2"
    elif [[ "$3" != - && "$(sha256sum < "$1")" != "$3  -" ]]; then
        echo "has another sha256 than $3"
    fi
}

# Bring $2 to the file $1. A server that cannot go on in the middle (curl: 33) has to begin anew; one that cannot be
# reached (6, 7) is asked once.
fetch() {
    local host status=0 options=(--fail --location --retry 3 --connect-timeout 20 --output "$1")
    host=$(cut -d / -f 1-3 <<< "$2")
    [[ "$unreachable" != *" $host "* ]] || return 1
    if [[ -t 2 ]]; then options+=(--progress-bar); else options+=(--silent --show-error); fi
    curl "${options[@]}" --continue-at - "$2" || status=$?
    if [[ $status -eq 33 ]]; then
        rm -f "$1"
        status=0
        curl "${options[@]}" "$2" || status=$?
    fi
    [[ $status -ne 6 && $status -ne 7 ]] || unreachable+="$host "
    return $status
}

# Put what is in the one folder of the archive $1 beside the archive.
unpack() {
    local there=$1.unpacked
    rm -rf "$there" &&
        "${PYTHON:-python3}" -m zipfile -e "$1" "$there" &&
        rm -rf "$there/__MACOSX" &&
        cp -r "$there"/*/. "$(dirname "$1")" &&
        rm -r "$there"
}

# GLUE has only the ids of MRPC's held-out rows: split Microsoft's file with them.
split_mrpc() {
    local folder=$data_dir/glue/MRPC
    [[ -f $folder/dev_ids.tsv && -f $folder/msr_paraphrase_train.txt && ! -f $folder/train.tsv ]] || return 0
    awk -F '\t' -v train="$folder/train.tsv.part" -v dev="$folder/dev.tsv" '
        { sub(/\r$/, "") }
        NR == FNR { held_out[$1, $2]; next }
        FNR == 1 || ($2, $3) in held_out { print > dev }
        FNR == 1 || !(($2, $3) in held_out) { print > train }
    ' "$folder/dev_ids.tsv" "$folder/msr_paraphrase_train.txt"
    mv "$folder/train.tsv.part" "$folder/train.tsv"
}

# Bring one line of the table to its place; says what it did, and fails if it could not.
bring() {
    local path=$1 bytes=$2 sha256=$3 url=$4 file=$data_dir/$1 mark="" fault
    if [[ "$path" == */ ]]; then
        file=$data_dir/$path${url##*/}
        mark=$data_dir/$path.${url##*/}  # says that the archive was unpacked, and needs not be kept
    fi
    if [[ -n "$mark" && -f "$mark" ]]; then
        echo "there    $path (${url##*/})"
        return
    fi
    if [[ -f "$file" ]]; then
        fault=$(fault_of "$file" "$bytes" "$sha256")
        if [[ -n "$fault" ]]; then
            echo "FAILED   $file $fault: remove it, and start again"
            return 1
        fi
        echo "there    $path"
    elif [[ "$check_only" == True ]]; then
        echo "missing  $path"
        return 1
    else
        mkdir -p "$(dirname "$file")"
        if ! fetch "$file.part" "$url"; then
            echo "FAILED   $path could not be fetched"
            return 1
        fi
        fault=$(fault_of "$file.part" "$bytes" "$sha256")
        if [[ -n "$fault" ]]; then
            rm "$file.part"
            echo "FAILED   $path $fault: it was not kept"
            return 1
        fi
        mv "$file.part" "$file"
        echo "fetched  $path"
    fi
    if [[ -n "$mark" && "$check_only" == False ]]; then
        if ! unpack "$file"; then
            echo "FAILED   $file could not be unpacked"
            return 1
        fi
        touch "$mark"
        rm "$file"
    fi
}

check_only=False
unreachable=" "
wanted=()
for word; do
    case $word in
        --check) check_only=True ;;
        -*) stop "unknown option $word: there is --check" ;;
        *)
            cut -f 1 "$table" | grep -q "^${word%/}/" ||
                stop "unknown data set $word: there are gsm8k, arithmetic, wikitext-2 and glue"
            wanted+=("${word%/}/")
            ;;
    esac
done
if [[ "$check_only" == False ]]; then
    command -v curl > /dev/null || stop "fetching needs curl: install it, or bring the files by hand ($table has the places)"
    mkdir -p "$data_dir" 2> /dev/null && [[ -w "$data_dir" ]] || stop "data_dir $data_dir cannot be written: set another"
fi

lacking=()
while IFS=$'\t' read -r path bytes sha256 url; do
    for start in "${wanted[@]:-}"; do
        if [[ "$path" == "$start"* ]]; then
            bring "$path" "$bytes" "$sha256" "$url" || lacking+=("$url  ->  $data_dir/$path")
            break
        fi
    done
done < <(tail -n +2 "$table")
[[ "$check_only" == True ]] || split_mrpc

if [[ ${#lacking[@]} -gt 0 ]]; then
    printf '\nWithout a network here, fetch these elsewhere, put them there (archives as they are), and start again:\n'
    printf '  %s\n' "${lacking[@]}"
    stop "${#lacking[@]} files are not in $data_dir" 1
fi
echo "all there: $data_dir"
