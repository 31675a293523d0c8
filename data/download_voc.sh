#!/bin/sh
# Fetch PASCAL VOC 2012 with the augmented masks and lay it out as TARGET_DIR/PascalVOC12.
#
#     sh data/download_voc.sh [TARGET_DIR]
#
# TARGET_DIR is the current folder by default, or data/ from the root of the repository; it is
# what --data_root names. A second run resumes what an interrupted one left, or does nothing.
# VOC_URL and AUG_URL name mirrors; archives that lie in TARGET_DIR already are used.
set -eu
. "$(dirname "$0")/fetch.sh"

VOC_URL=${VOC_URL:-http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar}
VOC_BYTES=${VOC_BYTES:-1999639040}
VOC_MD5=${VOC_MD5:-6cd6e144f989b92b3379bac3b3de84fd}
AUG_URL=${AUG_URL:-https://www.dropbox.com/s/oeu149j8qtbs1x0/SegmentationClassAug.zip?dl=1}
TRAIN_COUNT=${TRAIN_COUNT:-10582}
VAL_COUNT=${VAL_COUNT:-1449}

tar_file=VOCtrainval_11-May-2012.tar
zip_file=SegmentationClassAug.zip
tree=PascalVOC12
part=$tree.part

check_lists() { # TREE CURE
    for pair in train_aug:"$TRAIN_COUNT" val:"$VAL_COUNT"; do
        list=$1/splits/${pair%:*}.txt
        [ -f "$list" ] || die "$target/$list is missing: $2"
        expect_count "images in $list" "$(wc -l <"$list")" "${pair#*:}" "$2"
    done
}

target=$(target_dir "$0" "${1:-}")
cd "$target"
if [ -e $tree ]; then
    check_lists $tree "move $target/$tree away and run this again"
    echo "$target/$tree is there already, nothing to do"
    exit 0
fi

fetch_exact VOC_URL "$VOC_URL" $tar_file "$VOC_BYTES" "$VOC_MD5"
fetch_zip AUG_URL "$AUG_URL" $zip_file

echo "unpacking"
rm -rf $part
mkdir -p $part/splits
tar -xf $tar_file -C $part VOCdevkit/VOC2012/JPEGImages VOCdevkit/VOC2012/ImageSets/Segmentation
unzip_into $zip_file $part
mv $part/VOCdevkit/VOC2012/JPEGImages $part/

# Training images are all that have an augmented mask and are not validation images.
tr -d '\r' <$part/VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt | sort >$part/val
find $part/SegmentationClassAug -name '*.png' | sed 's|.*/||; s|\.png$||' | sort >$part/masks
comm -23 $part/masks $part/val >$part/train_aug
for list in train_aug val; do
    while read -r id; do
        [ -f "$part/JPEGImages/$id.jpg" ] || die "$tar_file holds no image for the mask $id.png"
        [ -f "$part/SegmentationClassAug/$id.png" ] || die "$zip_file holds no mask $id.png"
        echo "/JPEGImages/$id.jpg /SegmentationClassAug/$id.png"
    done <$part/$list >$part/splits/$list.txt
done
check_lists $part "delete $tar_file and $zip_file in $target and run this again"

rm -r $part/VOCdevkit $part/masks $part/val $part/train_aug
rm -rf $part/__MACOSX # rides along in the zip
mv $part $tree
echo "$target/$tree is complete; $tar_file and $zip_file may be deleted"
