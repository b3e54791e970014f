"""Write the record of a mix of formats, encoded with another record's importance vectors.

    python studies/finish/scripts/mix.py STUDY RECORD "IQ1_M / IQ4_XS" OUT [--target T] [--cache DIR]

So that a mix is finished and scored beside that record: OUT.json, in RECORD's folder. Names are those of
`allocator.decision.baselines`, all experts retained.
"""

import argparse
from pathlib import Path

import msgspec

from allocator.app.study_folder import StudyFolder
from allocator.decision.allocation_record import AllocationRecord, recorded_bytes
from allocator.decision.baselines import baselines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("record", type=Path)
    parser.add_argument("mix")
    parser.add_argument("out")
    parser.add_argument("--target")
    parser.add_argument("--cache", type=Path)
    args = parser.parse_args()
    study_folder = StudyFolder(args.study, cache=args.cache, target=args.target)
    layout, inventory = study_folder.layout, study_folder.inventory
    everyone = {layer: tuple(range(inventory.n_experts)) for layer in layout.layers}
    known = dict(baselines(layout, everyone, skilled=True))
    if args.mix not in known:
        raise SystemExit(f"{args.mix!r}: needed one of {'; '.join(known)}")
    allocation = known[args.mix]
    size = allocation.nbytes(layout)
    record = msgspec.structs.replace(
        AllocationRecord.read(args.record).unfinished,
        name=args.out,
        kind=args.mix,
        allocation=allocation.to_json(),
        digest=allocation.digest,
        bytes=recorded_bytes(size),
        effective_bits=size.encoded * 8 / inventory.n_searched_weights,
        loss={},
        sha256={},
    )
    args.record.with_name(f"{args.out}.json").write_bytes(record.to_bytes())


if __name__ == "__main__":
    main()
