"""First part of every random key after the seed, all in one place.

Pretraining, probe and fine-tuning share those of orders and views.
"""

ORDER, AUGMENT, REPLACE = 101, 102, 103  # of images; of views and masks; of images that cannot be decoded
INIT, DROP_PATH, MODEL = 201, 202, 203  # first weights; drop path; whatever else a model draws
MIXUP = 301
