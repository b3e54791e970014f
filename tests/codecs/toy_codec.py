"""A codec of one's own in one file: whole numbers of a few bits in groups of 16, one scale each.

Importing the module registers the codec. A block is an fp16 scale, then 16 codes of 3 or 5 bits,
the first one in the highest bits.
"""

import numpy as np

from allocator.codecs import Codec, register_codec
from allocator.formats import Format, Importance

GROUP = 16
BITS = {"INT5_G16": 5, "INT3_G16": 3}
TRIED = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # scales over the one that clips nothing


class ToyCodec(Codec):
    name = "toy"
    package = "toy-codec"
    version = "1"
    formats = (
        Format("INT5_G16", GROUP, 2 + 10, "toy", 1.58e-3, Importance.IGNORED),
        Format("INT3_G16", GROUP, 2 + 6, "toy", 3.17e-2),
    )

    def encode_rows(self, weights, fmt, importance, *, out):
        bits = BITS[fmt.name]
        most = 2 ** (bits - 1) - 1
        groups = weights.reshape(len(weights), -1, GROUP)
        ignored = importance is None or fmt.importance is Importance.IGNORED
        channels = np.float32(1) if ignored else importance.reshape(-1, GROUP)
        plain = np.abs(groups).max(-1, keepdims=True) / most
        best, least = np.zeros(groups.shape, np.uint8), np.full(plain.shape, np.inf, np.float32)
        scales = np.zeros(plain.shape, np.float16)
        for share in TRIED if fmt.importance is Importance.USED else TRIED[:1]:
            scale = (plain * np.float32(share)).astype(np.float16)
            step = scale.astype(np.float32)
            codes = np.rint(groups / np.where(step, step, 1)).clip(-most, most)
            error = (np.square(codes * step - groups) * channels).sum(-1, keepdims=True)
            better = error < least
            best, scales = np.where(better, codes + most, best), np.where(better, scale, scales)
            least = np.where(better, error, least)
        planes = np.unpackbits(best.astype(np.uint8)[..., None], axis=-1)[..., 8 - bits :]
        packed = np.packbits(planes.reshape(*plain.shape[:2], -1), axis=-1)
        blocks = np.concatenate([scales.view(np.uint8).reshape(*plain.shape[:2], 2), packed], -1)
        out[...] = blocks.reshape(out.shape)

    def decode_rows(self, data, fmt, *, out):
        bits = BITS[fmt.name]
        blocks = data.reshape(len(data), -1, fmt.block_bytes)
        scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)
        planes = np.unpackbits(blocks[..., 2:], axis=-1).reshape(*blocks.shape[:2], GROUP, bits)
        codes = planes @ (1 << np.arange(bits)[::-1])
        values = (codes - (2 ** (bits - 1) - 1)).astype(np.float32) * scales
        out[...] = values.reshape(out.shape)

    def weights_per_second(self, fmt):
        return 1e7

    def second_opinion(self, data, fmt):
        bits = BITS[fmt.name]
        rows = []
        for row in data:
            values = []
            for start in range(0, len(row), fmt.block_bytes):
                block = row[start : start + fmt.block_bytes].tobytes()
                scale = np.float32(np.frombuffer(block[:2], np.float16)[0])
                number = int.from_bytes(block[2:], "big")
                for place in reversed(range(GROUP)):
                    code = number >> (place * bits) & (2**bits - 1)
                    values.append(scale * np.float32(code - 2 ** (bits - 1) + 1))
            rows.append(values)
        return np.array(rows, np.float32)


TOY = ToyCodec()
register_codec(TOY)
