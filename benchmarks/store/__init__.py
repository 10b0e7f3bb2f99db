"""The feature store: what the teacher makes of every image and its views, encoded once, for any number of runs.

    STORE/store.json                   what all of it depends on besides the images (`layout.StoreKey`); who filled it
    STORE/<cell>/cell.json             the images: data set, fingerprint, corruption
    STORE/<cell>/images.parquet        a row an image, in the data set's order, those added later behind: id; size, time
                                       and digest of its file
    STORE/<cell>/labels.parquet        their labels
    STORE/<cell>/<shard>.safetensors   features of some of them (`shards`)
    STORE/.lock                        held while a process writes

The features are in safetensors: a shard is mapped into memory as it lies on the disk, in float16, and a batch reads its
own rows of it, so that a store may be far larger than the memory. (Arrow's columns of fixed-size lists would do as
well; a tensor of three axes is what they would have to be turned into for each batch.) The tables beside them are
Parquet, as a run's are.

Labels lie in a file of their own, which is opened for one purpose: to check that a data set's labels are still those
that the store was made with. What adapts is given a batch of features, and neither ids nor labels.
"""
