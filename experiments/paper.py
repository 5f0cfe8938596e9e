"""The numbers that the paper reports (Song, Meng, Ermon 2020), for comparison."""

STEPS = (10, 20, 50, 100, 1000)
IMAGES = 50_000  # samples for each FID


def _rows(steps, rows):
    return {(eta, S): value for eta, values in rows.items() for S, value in zip(steps, values, strict=True)}


FID = {  # data set -> (eta, S) -> FID of tables 1 and 3
    "cifar10": _rows(
        STEPS,
        {
            "0": (13.36, 6.84, 4.67, 4.16, 4.04),
            "0.2": (14.04, 7.11, 4.77, 4.25, 4.09),
            "0.5": (16.66, 8.35, 5.25, 4.46, 4.29),
            "1": (41.07, 18.36, 8.01, 5.78, 4.73),
            "hat": (367.43, 133.37, 32.72, 9.99, 3.17),
        },
    ),
    "celeba": _rows(
        STEPS,
        {
            "0": (17.33, 13.73, 9.17, 6.53, 3.51),
            "0.2": (17.66, 14.11, 9.51, 6.79, 3.64),
            "0.5": (19.86, 16.06, 11.01, 8.09, 4.28),
            "1": (33.12, 26.03, 18.48, 13.93, 5.98),
            "hat": (299.71, 183.83, 71.71, 45.20, 3.26),
        },
    ),
    "bedroom": _rows(STEPS[:4], {"0": (16.95, 8.89, 6.75, 6.62), "1": (42.78, 22.77, 10.81, 6.81)}),
    "church": _rows(STEPS[:4], {"0": (19.45, 12.47, 10.84, 10.58), "1": (51.56, 23.37, 11.16, 8.27)}),
}

# Table 2: S -> mean square error per dimension, in [0, 1], after encoding and decoding the test images of CIFAR-10.
RECONSTRUCTION = {10: 0.014, 20: 0.0065, 50: 0.0023, 100: 0.0009, 200: 0.0004, 500: 0.0001, 1000: 0.0001}


def fid_of(name: str) -> dict[tuple[str, int], float]:
    """The FIDs of the data set whose name is part of the config's name; empty if the paper has no such data set."""
    return next((table for data, table in FID.items() if data in name), {})
