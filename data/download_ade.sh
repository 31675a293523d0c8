#!/bin/sh
# Fetch ADE20K (SceneParse150) and lay it out as TARGET_DIR/ADEChallengeData2016.
#
#     sh data/download_ade.sh [TARGET_DIR]
#
# TARGET_DIR is the current folder by default, or data/ from the root of the repository; it is
# what --data_root names. A second run resumes what an interrupted one left, or does nothing.
# ADE_URL names a mirror; an archive that lies in TARGET_DIR already is used.
set -eu
. "$(dirname "$0")/fetch.sh"

ADE_URL=${ADE_URL:-http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip}
TRAIN_COUNT=${TRAIN_COUNT:-20210}
VAL_COUNT=${VAL_COUNT:-2000}

zip_file=ADEChallengeData2016.zip
tree=ADEChallengeData2016
part=$tree.part

check_tree() { # TREE CURE
    for pair in training:"$TRAIN_COUNT" validation:"$VAL_COUNT"; do
        for folder in images/"${pair%:*}" annotations/"${pair%:*}"; do
            [ -d "$1/$folder" ] || die "$target/$1/$folder is missing: $2"
            expect_count "files in $folder" "$(find "$1/$folder" -type f | wc -l)" "${pair#*:}" "$2"
        done
    done
}

target=$(target_dir "$0" "${1:-}")
cd "$target"
if [ -e $tree ]; then
    check_tree $tree "move $target/$tree away and run this again"
    echo "$target/$tree is there already, nothing to do"
    exit 0
fi

fetch_zip ADE_URL "$ADE_URL" $zip_file

echo "unpacking"
rm -rf $part
unzip_into $zip_file $part
check_tree $part/$tree "delete $target/$zip_file and run this again"

mv $part/$tree $tree
rm -r $part
echo "$target/$tree is complete; $zip_file may be deleted"
