"""The files inside an image: `browse --files`, with the extra `rewindfs[files]` (the dissect libraries).

An image of a moment is given to a process of its own (`worker`), which reads its partition table and file systems and
is asked by the mount (`image_process`). The libraries parse what anybody may have written: what they do wrong, for how
long and with how much memory, ends with their process. No module here knows pyfuse3 or trio.

    filesystem      the interface to one file system: entries, status, bytes, links, attributes
    image_stream    the image as the libraries want it: a file to seek and read, with blocks replaced by a journal's
    runs            where the bytes of a file are
    ext, xfs, btrfs, ntfs, fat      each file system, by its library
    ext_journal     what the journal of an ext3 or ext4 holds and its file system does not yet
    image_tree      partitions and file systems as one tree
    messages        what the mount and the process say to each other
"""
