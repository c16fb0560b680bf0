"""First part of every random key after the seed, all in one place: no two uses share numbers."""

ORDER, AUGMENT, REPLACE = 101, 102, 103  # of images; of views and masks; of images that cannot be decoded
INIT, DROP_PATH, MODEL = 201, 202, 203  # first weights; drop path; whatever else a model draws
MIXUP = 301
