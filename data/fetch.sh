# shellcheck shell=sh
# Sourced by the download_*.sh beside it: resumable downloads that are checked before use.

export LC_ALL=C # one sort order everywhere
unset CDPATH    # else cd would print
PYTHON=${PYTHON:-python3}

# One line to stderr, then the end; what was downloaded so far stays for the next run.
die() {
    echo "error: $*" >&2
    exit 1
}

command -v "$PYTHON" >/dev/null || die "no $PYTHON to unpack archives: set PYTHON to yours"

# Print the target folder: the argument, else the current folder, or its data/ when the script was
# started as data/download_*.sh from the root of the repository.
target_dir() { # SCRIPT [DIR]
    script_dir=$(cd "$(dirname "$1")" && pwd)
    if [ -n "${2:-}" ]; then
        mkdir -p "$2" && cd "$2" && pwd
    elif [ "$script_dir" = "$(pwd)/data" ]; then
        echo "$script_dir"
    else
        pwd
    fi
}

md5_of() { # FILE
    if command -v md5sum >/dev/null; then
        md5sum <"$1" | cut -d ' ' -f 1
    else
        md5 -q "$1" # macOS
    fi
}

bytes_of() { # FILE
    echo $(($(wc -c <"$1")))
}

# A zip whose table of contents is there and whose every checksum fits.
zip_is_whole() { # FILE
    "$PYTHON" -c 'import sys, zipfile
sys.exit(zipfile.ZipFile(sys.argv[1]).testzip() is not None)' "$1" 2>/dev/null
}

unzip_into() { # FILE DIR
    "$PYTHON" -m zipfile -e "$1" "$2"
}

# Continue FILE from where an earlier run stopped. Gives up on a host that is silent for a minute.
resume() { # URL FILE
    echo "downloading $1"
    if command -v curl >/dev/null; then
        [ -t 2 ] && meter=--progress-bar || meter=--silent
        curl --fail --location --continue-at - --connect-timeout 30 --speed-time 60 \
            --speed-limit 1 --show-error "$meter" --output "$2" "$1"
    elif command -v wget >/dev/null; then
        [ -t 2 ] && meter=--progress=bar || meter=--no-verbose
        wget --continue --timeout=60 --tries=2 "$meter" --output-document="$2" "$1"
    else
        die "neither curl nor wget is installed: install one, or place $2 in $(pwd) by hand"
    fi
}

# Resume FILE, or say what is missing. KEY names the variable that overrides the URL.
fetch() { # KEY URL FILE WHAT
    resume "$2" "$3" || die "$4 is missing, $2 did not deliver it. Run this again to resume" \
        "(after deleting $(pwd)/$3, if that does not help), set $1 to the URL of a mirror, or" \
        "place the file as $(pwd)/$3 by hand"
}

# Make FILE in the current folder a whole zip.
fetch_zip() { # KEY URL FILE
    [ -f "$3" ] && zip_is_whole "$3" && return
    fetch "$1" "$2" "$3" "$3"
    zip_is_whole "$3" || die "$(pwd)/$3 is damaged: delete it and run this again"
}

# Make FILE in the current folder a file of BYTES bytes with this MD5 sum.
fetch_exact() { # KEY URL FILE BYTES MD5
    if ! [ -f "$3" ] || [ "$(bytes_of "$3")" -lt "$4" ]; then
        fetch "$1" "$2" "$3" "$3 ($4 bytes, md5 $5)"
    fi
    bytes=$(bytes_of "$3")
    md5=$(md5_of "$3")
    [ "$bytes $md5" = "$4 $5" ] || die "$(pwd)/$3 is damaged: it has $bytes bytes and md5 $md5," \
        "not $4 and $5. Delete it and run this again"
}

# Fail unless WHAT was found as often as it must be.
expect_count() { # WHAT FOUND EXPECTED CURE
    [ "$2" -eq "$3" ] || die "found $2 $1 where $3 are expected: $4"
}
