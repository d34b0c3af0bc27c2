"""The exception for users' mistakes in data: folders, shards, settings. One bad sample is a `schema.SampleError`."""


class DataError(Exception):
    """Something the user can mend; the message names the file or setting, the value and the way out."""


class LoadError(DataError):
    """Loading failed in this process: other ranks of the job may know nothing of it, so each says its own."""
