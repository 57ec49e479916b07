TASKS = {}


def load(names, limit, seed):
    return []
