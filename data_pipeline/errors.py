"""The exception for users' mistakes in data: folders, shards, settings of a plan. Bad single samples are `schema.SampleError`."""


class DataError(Exception):
    """Something the user can mend; the message names the file or setting, the value and the way out."""
