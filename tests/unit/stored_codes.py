"""A stand-in for a `CodeStore` with the same attributes, from arrays in memory."""

from types import SimpleNamespace

import numpy as np

from tl_codebook.names import as_code


class StoredCodes:
    """Codes of sequences one after the other. `ids` holds [token, group, k] by hook name; n_codes (or -1) stands for no code."""

    def __init__(self, ids, n_codes, lengths=None, special=()):
        self.n_tokens = len(next(iter(ids.values())))
        self.lengths = [self.n_tokens] if lengths is None else list(lengths)
        assert sum(self.lengths) == self.n_tokens
        self.special = np.zeros(self.n_tokens, dtype=bool)
        self.special[list(special)] = True
        self.n_codes = n_codes if isinstance(n_codes, dict) else dict.fromkeys(ids, n_codes)
        self._ids = {name: np.where(each < 0, self.n_codes[name], each).astype(np.uint16) for name, each in ids.items()}
        self.sites = {
            name: SimpleNamespace(n_codes=self.n_codes[name], n_groups=each.shape[1], k=each.shape[2], label=name)
            for name, each in self._ids.items()
        }
        self._index = {}

    def ids(self, name):
        return self._ids[name]

    def is_special(self):
        return self.special

    def sequence_of(self, positions):
        return np.searchsorted(np.cumsum(self.lengths), positions, side="right")

    def _inverted(self, name):
        if name not in self._index:
            ids, n_codes = np.sort(self._ids[name], axis=-1), self.n_codes[name]
            fresh = ids < n_codes
            fresh[..., 1:] &= ids[..., 1:] != ids[..., :-1]
            token, group, slot = np.nonzero(fresh)
            flat = group * n_codes + ids[token, group, slot]
            order = np.argsort(flat, kind="stable")
            counts = np.bincount(flat, minlength=ids.shape[1] * n_codes)
            self._index[name] = token[order], np.concatenate([[0], np.cumsum(counts)])
        return self._index[name]

    def counts(self, name):
        return np.diff(self._inverted(name)[1]).reshape(-1, self.n_codes[name])

    def positions(self, code):
        code = as_code(code)
        tokens, offsets = self._inverted(code.hook_name)
        number = (code.group or 0) * self.n_codes[code.hook_name] + code.code
        return tokens[offsets[number] : offsets[number + 1]]
