"""The table of images that every oracle test runs over: one of everything that qemu-img and qemu-io can make.

Grouped as the format is: geometry, kinds of clusters, header features, sizes, chains. ``VARIANTS`` is the product's
promise "every image that qemu-img makes can be read" as data.
"""

from tests.support.images import Layer, Variant

#: Every kind of standard cluster, mapped and not, whole and in part, twice written and given back.
KINDS = (
    "write 0 2c",
    "write 5c+512 1536",
    "write 8c 5c",
    "unmap 9c 1c",
    "zero 10c 1c",
    "discard 11c 1c",
    "zero 14c 2c",
    "write 20c 1c",
    "write 19c 1c",
    "write 30c+512 512",
    "write 39c 1c",
)
#: The same, and on into a second L2 table of small clusters, up to a partial last cluster.
SPREAD = (*KINDS, "write 62c 4c", "zero 126c 3c", "write 129c 512", "write 139c 1c", "write 140c 512")

#: Every state of a subcluster, and whole clusters between them (Q44, Q47).
SUBCLUSTERS = (
    "write 0 1s",
    "write 3s 2s",
    "zero 6s 1s",
    "write 1c 1c",
    "unmap 1c+4s 3s",
    "zero 1c+9s 2s",
    "discard 1c+20s 4s",
    "unmap 3c 1c",
    "write 5c+31s 2s",
    "write 8c 1c",
    "discard 8c 1c",
    "write 10c+512 512",
    "zero 12c+16s 1c",
    "write 14c 1c",
    "zero 14c 1c",
)


def single(
    name: str,
    options: str = "",
    steps: tuple[str, ...] = KINDS,
    size: str = "40c",
    *,
    serve: tuple[str, ...] = (),
    snapshots: tuple[str, ...] = (),
    huge: bool = False,
) -> Variant:
    """A disk of one image."""
    return Variant(name, (Layer(size, steps, options),), serve, snapshots, huge)


def _geometry() -> list[Variant]:
    found = [single("v2", "compat=0.10", SPREAD, "140c+512"), single("v3", "compat=1.1", SPREAD, "140c+512")]
    for size in ("512", "1k", "2k", "4k", "8k", "16k", "32k", "128k"):
        found.append(single(f"clusters-{size}", f"cluster_size={size}", SPREAD, "140c+512"))
    for size in ("256k", "512k", "1M", "2M"):
        found.append(single(f"clusters-{size}", f"cluster_size={size}"))
    found.append(single("v2-clusters-512", "compat=0.10,cluster_size=512", SPREAD, "140c+512"))
    found.append(single("v2-clusters-2M", "compat=0.10,cluster_size=2M"))
    for size in ("16k", "64k", "2M"):
        found.append(single(f"extended-l2-{size}", f"extended_l2=on,cluster_size={size}", SUBCLUSTERS, "20c"))
    for bits in (1, 2, 4, 8, 32, 64):
        found.append(single(f"refcount-bits-{bits}", f"refcount_bits={bits}"))
    return found


def _compression() -> list[Variant]:
    mixed = (
        "compress 0 4c",
        "write 2c 1c",
        "zero 3c 1c",
        "noise 6c 2c",
        "compress 8c 1c",
        "write 9c+512 512",
        "compress 10c 3c",
        "discard 11c 1c",
        "compress 39c 1c",
    )
    partial = ("compress 0 2c", "compress 4c 1c", "compress 10c 512")  # the last cluster is padded (Q56)
    found = []
    for method in ("zlib", "zstd"):
        chosen = f"compression_type={method}"
        found += [
            single(f"{method}-mixed", chosen, mixed),
            single(f"{method}-partial-last-cluster", chosen, partial, "10c+512"),
            single(
                f"{method}-clusters-2M",
                f"{chosen},cluster_size=2M",
                ("compress 0 2c", "write 3c 1c", "noise 4c 1c"),
                "6c",
            ),
            single(f"{method}-clusters-4k", f"{chosen},cluster_size=4k", (*mixed, "compress 500c 40c"), "600c"),
            single(
                f"{method}-extended-l2",
                f"{chosen},extended_l2=on",
                ("compress 0 2c", "write 2c+3s 1s", "compress 4c 1c"),
                "8c",
            ),
        ]
    found.append(single("zlib-v2", "compat=0.10", mixed))
    found.append(
        single(
            "zlib-clusters-512",
            "cluster_size=512",
            ("compress 0 70c", "write 3c 1c", "noise 80c 4c", "zero 90c 2c"),
            "100c",
        )
    )
    return found


def _features() -> list[Variant]:
    plain = ("zero 0 4c", "write 8c 4c", "unmap 9c 2c")
    reserved = ("write 0 4c", "zero 1c 2c", "zero 8c 1c")
    found = [
        single("zeros-plain", steps=plain),
        single("zeros-preallocated", steps=reserved),
        single("lazy-refcounts", "lazy_refcounts=on"),
        single("dirty", "lazy_refcounts=on", (*KINDS, "poke 72 8 1")),
        single("corrupt", steps=(*KINDS, "poke 72 8 2")),
        single("unknown-compatible-and-autoclear-bits", steps=(*KINDS, "poke 80 8 0x100", "poke 88 8 0x8000")),
        single("amended-to-v2", steps=("write 0 4c", "write 9c 512", "amend compat=0.10")),
        single("amended-to-v3", "compat=0.10", (*KINDS, "amend compat=1.1", "zero 20c 4c")),
        single("amended-refcounts", steps=(*KINDS, "amend refcount_bits=64")),
        single("grown", steps=(*KINDS, "resize 3000c", "write 2999c 1c")),
        single("shrunk", steps=(*KINDS, "resize 20c+512")),
    ]
    for mode in ("metadata", "falloc", "full"):
        found.append(single(f"preallocation-{mode}", f"preallocation={mode}"))
        found.append(single(f"preallocation-{mode}-untouched", f"preallocation={mode}", ()))
    found.append(single("preallocation-extended-l2", "preallocation=metadata,extended_l2=on", SUBCLUSTERS, "20c"))
    for raw in ("off", "on"):
        found.append(
            single(
                f"data-file-raw-{raw}",
                f"data_file={{directory}}/guest.data,data_file_raw={raw}",
                serve=("--allow-data-file",),
            )
        )
    found.append(
        single(
            "data-file-extended-l2",
            "data_file={directory}/guest.data,extended_l2=on",
            SUBCLUSTERS,
            "20c",
            serve=("--allow-data-file",),
        )
    )
    return found


def _sizes() -> list[Variant]:
    found = [
        single("empty-disk", steps=(), size="0"),
        single("one-sector", steps=("write 0 512",), size="512"),
        single("one-sector-untouched", steps=(), size="512"),
        single("three-sectors", steps=("write 512 512",), size="1536"),
        single("one-cluster-and-a-sector", steps=("write 1c 512",), size="1c+512"),
        single("odd-number-of-sectors", steps=KINDS, size="41c-512"),
        single("size-not-of-sectors", steps=("write 0 512", "poke 24 8 1000"), size="1024"),  # a disk of 512 (Q4)
    ]
    for size, options in (("16T", ""), ("64T", "cluster_size=2M"), ("128G", "cluster_size=512")):
        ends = ("write 0 64k", "write 100G+64k 128k", f"zero {size}-4M 64k", f"write {size}-64k 64k")
        found.append(single(f"huge-{size}", options, ends, size, huge=True))
    return found


def _snapshots() -> list[Variant]:
    history = (
        *KINDS,
        "snapshot first",
        "write 0 1c",
        "write 16c 2c",
        "zero 20c 1c",
        "snapshot second",
        "discard 8c 4c",
        "write 9c 512",
    )
    base = Layer("30c", KINDS[:3])
    return [
        single("snapshots", steps=history, snapshots=("first", "second")),
        single("snapshots-v2", "compat=0.10", history, snapshots=("first", "second")),
        single("snapshots-extended-l2", "extended_l2=on", history, snapshots=("first", "second")),
        single("snapshots-compressed", steps=("compress 0 8c", *history[len(KINDS) :]), snapshots=("first", "second")),
        Variant("snapshots-over-backing", (base, Layer("40c", history)), snapshots=("first", "second")),
    ]


def depth_chain(depth: int) -> Variant:
    """``depth`` layers that each write one cluster of their own and half of their neighbour's."""
    layers = tuple(
        Layer(f"{2 * depth + 2}c", (f"write {2 * i}c 1c", f"write {2 * i + 1}c+32k 64k")) for i in range(depth)
    )
    return Variant(f"depth-{depth}", layers)


def _chains() -> list[Variant]:
    base = Layer("40c", KINDS)
    over = Layer("40c", ("write 1c 2c", "zero 8c 1c", "unmap 12c 2c", "write 20c+512 512", "discard 30c 1c"))
    found = [depth_chain(depth) for depth in (*range(1, 21), 100)]

    def chain(name: str, *layers: Layer, serve: tuple[str, ...] = (), huge: bool = False) -> None:
        found.append(Variant(name, layers, serve, huge=huge))

    # names
    chain(
        "names-in-subdirectories",
        Layer("4M", KINDS, name="store/base.qcow2"),
        Layer("4M", over.steps, name="store/deep/mid.qcow2"),
        Layer("4M", ("write 3c 1c",)),
    )
    chain("names-absolute", base, Layer("40c", over.steps, backing="{directory}/0.qcow2"))
    chain(
        "names-absolute-elsewhere",
        Layer("40c", KINDS, name="../elsewhere/base.qcow2"),
        Layer("40c", over.steps),
        serve=("--allow-backing", "{directory}/../elsewhere"),
    )

    # raw bases
    chain("raw-base", Layer("4M", ("write 64k 128k", "write 1M 4k"), format="raw"), over)
    chain("raw-base-full", Layer("1M", ("write 0 1M",), format="raw"), Layer("1M", ("write 64k 64k",)))
    chain(
        "raw-base-odd-length",
        Layer("4M", ("write 0 1M", "truncate 777777"), format="raw"),
        Layer("2M", ("write 4c 1c",)),
    )
    chain(
        "raw-base-odd-length-hole-at-end", Layer("4M", ("write 0 64k", "truncate 1000001"), format="raw"), Layer("2M")
    )
    chain("raw-base-longer", Layer("4M", ("write 0 4M",), format="raw"), Layer("1M+512", ("zero 1M 512",)))
    chain("raw-base-empty", Layer("0", format="raw"), Layer("1M", ("write 64k 64k",)))

    chain("raw-top-odd-length", Layer("1M", ("write 64k 128k", "write 800k 64k", "truncate 854321"), format="raw"))
    chain("raw-top", Layer("4M", ("write 64k 128k", "write 1M 4k", "write 4M-512 512"), format="raw"))

    # geometry and version by layer
    chain("v2-over-v3", base, Layer("40c", over.steps, "compat=0.10"))
    chain("v3-over-v2", Layer("40c", KINDS, "compat=0.10"), over)
    chain(
        "2M-over-512",
        Layer("4M", ("write 0 3k", "zero 1M 512", "write 3M+512 1k"), "cluster_size=512"),
        Layer("4M", ("write 2M+4k 4k",), "cluster_size=2M"),
    )
    chain(
        "512-over-2M",
        Layer("4M", ("write 0 1M", "write 3M 64k"), "cluster_size=2M"),
        Layer("4M", ("write 512 512", "zero 2k 512", "write 2M-512 1k"), "cluster_size=512"),
    )
    chain(
        "clusters-of-each-size",
        *(
            Layer("8M", (f"write {i}M 1c", f"write {i}M+300k 3k", f"zero {i * 512}k 1c"), f"cluster_size={size}")
            for i, size in enumerate(("64k", "2M", "512", "4k", "1M", "16k", "128k"))
        ),
    )
    extended = Layer("40c", SUBCLUSTERS, "extended_l2=on")
    chain("extended-l2-middle", base, extended, over)
    chain("extended-l2-over-standard", base, extended)
    chain("extended-l2-over-extended-l2", Layer("10M", SUBCLUSTERS, "extended_l2=on,cluster_size=128k"), extended)
    chain(
        "extended-l2-preallocated-over-backing",
        base,
        Layer("40c", ("write 3s 1s",), "extended_l2=on,preallocation=metadata"),
    )
    chain("extended-l2-over-raw", Layer("2M", ("write 0 300k", "truncate 310000"), format="raw"), extended)

    # sizes by layer (S1, S2, P2)
    chain("backing-shorter", Layer("1M", ("write 0 1M",)), Layer("2M", ("write 17c 1c",)))
    chain("backing-shorter-by-a-sector", Layer("1M+512", ("write 0 1M+512",)), Layer("1M+1024", ()))
    chain(
        "backing-ends-inside-a-cluster",
        Layer("90k", ("write 0 90k",), "cluster_size=4k"),
        Layer("200k", ("write 1c+4k 4k",)),
    )
    chain("backing-longer", Layer("2M", ("write 0 2M",)), Layer("1M", ("write 3c 1c",)))
    chain(
        "short-in-the-middle",
        Layer("2M", ("write 0 2M",)),
        Layer("1M", ("write 2c 1c",)),
        Layer("2M", ("write 20c 1c",)),
    )
    chain(
        "short-in-the-middle-of-four",
        Layer("4M", ("write 0 4M",)),
        Layer("1M"),
        Layer("3M", ("write 40c 1c",)),
        Layer("4M"),
    )
    chain(
        "steps-down-and-up",
        *(Layer(f"{size}c+512", (f"write {at}c 1c",)) for at, size in enumerate((30, 20, 10, 25, 5, 35))),
    )
    chain("backing-empty-disk", Layer("0"), Layer("1M", ("write 1c 1c",)))
    chain("overlay-empty-disk", base, Layer("0"))
    chain("overlay-grown-over-longer-backing", Layer("4M", ("write 0 4M",)), Layer("1M", ("write 1c 1c", "resize 3M")))
    chain("overlay-shrunk", base, Layer("40c", (*over.steps, "resize 10c+512")), Layer("40c", ("write 38c 1c",)))

    # what hides what
    chain("zeros-over-data", base, Layer("40c", ("zero 0 40c",)))
    chain(
        "zeros-over-data-in-v2",
        Layer("40c", KINDS, "compat=0.10"),
        Layer("40c", ("zero 0 4c", "discard 8c 2c"), "compat=0.10"),
    )
    chain("data-over-zeros-over-data", base, Layer("40c", ("zero 0 40c",)), over)
    chain("untouched-overlay", base, Layer("40c"))
    chain("compressed-base", Layer("40c", ("compress 0 40c",)), over)
    chain(
        "compressed-base-odd", Layer("10c+512", ("compress 0 10c", "compress 10c 512"), "compression_type=zstd"), over
    )
    chain("compressed-overlay", base, Layer("40c", ("compress 2c 10c", "unmap 4c 1c")))
    chain(
        "zlib-over-zstd",
        Layer("40c", ("compress 0 20c",), "compression_type=zstd"),
        Layer("40c", ("compress 10c 20c",)),
    )
    chain(
        "data-file-in-the-middle",
        base,
        Layer("40c", over.steps, "data_file={directory}/guest.data"),
        Layer("40c", ("write 6c 2c",)),
        serve=("--allow-data-file",),
    )
    chain(
        "data-file-raw-at-the-bottom",
        Layer("40c", KINDS, "data_file={directory}/guest.data,data_file_raw=on"),
        over,
        serve=("--allow-data-file",),
    )
    chain("committed-and-kept", base, Layer("40c", (*over.steps, "commit")), Layer("40c", ("write 30c 1c",)))
    chain(
        "committed-grown",
        Layer("20c", KINDS[:7]),
        Layer("40c", (*over.steps, "write 35c 1c", "commit")),
        Layer("40c", ("zero 35c 1s",)),
    )
    chain("preallocated-middle", base, Layer("40c", ("write 3s 5s",), "preallocation=metadata,extended_l2=on"), over)
    chain("huge-over-small", Layer("4M", ("write 0 1M",)), Layer("16T", ("write 8T 64k", "zero 64k 64k")), huge=True)
    return found


VARIANTS: list[Variant] = [
    *_geometry(),
    *_compression(),
    *_features(),
    *_sizes(),
    *_snapshots(),
    *_chains(),
]
SNAPSHOTS: list[tuple[Variant, str]] = [(variant, name) for variant in VARIANTS for name in variant.snapshots]
