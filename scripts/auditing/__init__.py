"""The parts of `make audit`: the locks, licences, the SBOM and known advisories."""
