#!/bin/sh
# Fetch COCO 2017 with the pixel maps of COCO-Stuff and lay it out as TARGET_DIR/COCO2017.
#
#     sh data/download_coco.sh [TARGET_DIR]
#
# TARGET_DIR is the current folder by default, or data/ from the root of the repository; it is
# what --data_root names. A second run resumes what an interrupted one left, or does nothing.
# TRAIN_URL, VAL_URL and MAPS_URL name mirrors; archives that lie in TARGET_DIR already are used.
set -eu
. "$(dirname "$0")/fetch.sh"

TRAIN_URL=${TRAIN_URL:-http://images.cocodataset.org/zips/train2017.zip}
VAL_URL=${VAL_URL:-http://images.cocodataset.org/zips/val2017.zip}
MAPS_URL=${MAPS_URL:-http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/stuffthingmaps_trainval2017.zip}
TRAIN_COUNT=${TRAIN_COUNT:-118287}
VAL_COUNT=${VAL_COUNT:-5000}

maps_file=stuffthingmaps_trainval2017.zip
tree=COCO2017
part=$tree.part

check_tree() { # TREE CURE
    for pair in train2017:"$TRAIN_COUNT" val2017:"$VAL_COUNT"; do
        for folder in images/"${pair%:*}" stuffthingmaps/"${pair%:*}"; do
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

fetch_zip TRAIN_URL "$TRAIN_URL" train2017.zip
fetch_zip VAL_URL "$VAL_URL" val2017.zip
fetch_zip MAPS_URL "$MAPS_URL" $maps_file

echo "unpacking"
rm -rf $part
mkdir -p $part
unzip_into train2017.zip $part/images
unzip_into val2017.zip $part/images
unzip_into $maps_file $part/stuffthingmaps
check_tree $part "delete train2017.zip, val2017.zip and $maps_file in $target and run this again"

mv $part $tree
echo "$target/$tree is complete; train2017.zip, val2017.zip and $maps_file may be deleted"
