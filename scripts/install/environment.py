"""Create .venv from a hash-locked file in docker/, and rebuild it when that file changes; `make` runs this first.

    python3 -m install               # VARIANT, TORCH_CPU_LINKS and pip's own settings come by environment

The order of events: is .venv what its lock says? If so, done. Else choose the variant, look whether it can work here,
fetch uv, let uv install exactly the lock (nothing is resolved on this machine), and write the mark that says so.

Standard library only, and nothing that Python 3.6 cannot parse, so that an old python3 gets a sentence instead of a
syntax error. Heavy modules are imported where they are used: when there is nothing to do, that is most of the time.
"""

import os
import re
import shutil
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
VENV = os.path.join(ROOT, ".venv")
CACHE = os.path.join(ROOT, ".cache")
# What sha256sum prints for the lock that .venv was made from. Written last: a set-up that was cut off has no mark.
MARK = os.path.join(VENV, "lock.sha256")

# GB on disk with uv's cache (its files are hard links) and the bytecode of a first run; measured: 2.5, 5.8 and 9.2.
VARIANTS = {"cpu": 3, "cuda": 6.5, "cuda-vllm": 10}
# A page of torch wheels alone. As a package index, the folder above it would hide the real one for every other name.
PYTORCH_PAGE = "https://download.pytorch.org/whl/cpu/torch/"
PAGE_TIMEOUT = 5  # seconds


class Refusal(Exception):
    """This machine cannot do it; the message says where, why and what would help."""

    exit_code = 3


class WrongInput(Refusal):
    """The user's variable is wrong."""

    exit_code = 2


def main():
    asked = os.environ.get("VARIANT", "")
    if asked and asked not in VARIANTS:
        raise WrongInput(f"VARIANT={asked} is none of {', '.join(VARIANTS)}")
    if not up_to_date(asked):
        check_interpreter()
        with only_one():
            if not up_to_date(asked):  # the one we waited for may have done it
                install(asked)
    link_recipes()


def link_recipes():
    """Let .venv import `common` from recipes/, by a line relative to site-packages, so that a checkout may move."""
    import glob

    for packages in glob.glob(os.path.join(glob.escape(VENV), "lib", "python3*", "site-packages")):
        link = os.path.join(packages, "recipes.pth")
        if not os.path.exists(link):
            write_whole(link, os.path.relpath(os.path.join(ROOT, "recipes"), packages).encode() + b"\n")


# --- is there anything to do? -------------------------------------------------------------------------------------


def up_to_date(asked):
    """True when .venv is whole, of the variant asked for (any, if none), and made from the lock as it is now."""
    made = marked_variant()
    if not made or asked not in ("", made) or not os.path.exists(os.path.join(VENV, "bin", "python")):
        return False
    with open(MARK) as mark:
        if mark.read() != mark_text(made):
            return False
    if made == "cpu" and not asked and gpu_visible():
        say("this machine has an NVIDIA GPU and .venv holds the CPU build; `make setup VARIANT=cuda` changes that")
    return True


def marked_variant():
    """The variant .venv was made for, "" when there is no whole .venv."""
    try:
        with open(MARK) as mark:
            found = re.search(r"docker/(.+)\.lock", mark.read())
    except FileNotFoundError:
        return ""
    return found.group(1) if found and found.group(1) in VARIANTS else ""


def mark_text(variant):
    return f"{sha256(lock_file(variant))}  docker/{variant}.lock\n"


def lock_file(variant):
    return os.path.join(ROOT, "docker", variant + ".lock")


def sha256(path):
    import hashlib

    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


# --- can it work here, and what is to be installed? ---------------------------------------------------------------


def check_interpreter():
    import platform

    if sys.version_info < (3, 11):  # noqa: UP036 - this is the check
        raise Refusal(
            f"python3 here is {platform.python_version()}; the recipes need 3.11 or newer: "
            "install it, or make PYTHON=/path/to/python3.12"
        )
    system, machine = platform.system(), platform.machine()
    if (system, machine) != ("Linux", "x86_64"):
        raise Refusal(f"this is {system} on {machine}; the locks are for Linux on x86_64: use such a machine")


def gpu_visible():
    return os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi") is not None


def choose_variant(asked):
    """Returns the variant (asked for, as it was, or what suits this machine) and, for cpu, where its torch is."""
    variant = asked or marked_variant()
    if variant in ("cuda", "cuda-vllm") or (not variant and gpu_visible()):
        return variant or "cuda", ""
    links, why = torch_cpu_links(*locked_cpu_torch(), tag=f"cp{sys.version_info[0]}{sys.version_info[1]}")
    if links:
        return "cpu", links
    if variant == "cpu":
        raise Refusal(f"the CPU build of torch is not in reach ({why}): set TORCH_CPU_LINKS, or VARIANT=cuda")
    say(
        f"the CPU build of torch is not in reach ({why}): installing the CUDA build, which also runs on the CPU; "
        f"{VARIANTS['cuda']} GB"
    )
    return "cuda", ""


def locked_cpu_torch():
    """The version and the set of sha256 that docker/cpu.lock allows for torch."""
    with open(lock_file("cpu")) as lock:
        version, hashes = re.search(r"^torch==(\S+)((?:\s+\\\s+--hash=sha256:\w+)+)", lock.read(), re.M).groups()
    return version, set(re.findall(r"sha256:(\w+)", hashes))


def torch_cpu_links(version, hashes, tag):
    """Returns (folder or page that holds the CPU build of torch for this Python, "") or ("", why there is none).

    TORCH_CPU_LINKS if given, else what pip is configured to look at, else PyTorch's own page. uv gets it as
    --find-links: torch has no CPU build on the index. `hashes` are those the lock allows; None allows any.
    """
    given = os.environ.get("TORCH_CPU_LINKS", "")
    places = [given] if given else [place for value in pip_settings("find-links") for place in value.split()]
    for place in places:
        if os.path.isdir(os.path.expanduser(place)):  # uv does not know ~, and may run in another folder
            place = os.path.abspath(os.path.expanduser(place))
        if cpu_wheel_at(place, version, hashes, tag):
            return place, ""
    if given:
        raise WrongInput(f"TORCH_CPU_LINKS={given} holds no torch {version} for {tag} that docker/cpu.lock knows")
    if cpu_wheel_at(PYTORCH_PAGE, version, hashes, tag):
        return PYTORCH_PAGE, ""
    return "", f"no torch {version} for {tag} with a hash in docker/cpu.lock, in pip's find-links or at {PYTORCH_PAGE}"


def cpu_wheel_at(place, version, hashes, tag):
    import urllib.parse

    wheel = re.compile(rf"torch-{re.escape(version)}-{tag}-{tag}-\S*x86_64\.whl")
    folder = urllib.parse.unquote(re.sub("^file://", "", place))
    if os.path.isdir(folder):
        found = [os.path.join(folder, name) for name in os.listdir(folder) if wheel.fullmatch(name)]
        return any(hashes is None or sha256(path) in hashes for path in found)
    if not re.match("https?://", place):
        return False
    for url in links_of(place):
        path, _, fragment = url.partition("#sha256=")
        if wheel.fullmatch(urllib.parse.unquote(path.rsplit("/", 1)[-1])):
            # A plain listing of a folder has no hashes; uv still checks what it downloads.
            return hashes is None or not fragment or fragment in hashes
    return False


def links_of(page):
    """Every link of a web page, absolute; none when it does not answer in time."""
    import contextlib
    import threading

    found = []

    def ask():
        with contextlib.suppress(OSError):
            found.extend(page_links(page))

    # In a thread, because a timeout of urllib's counts anew for each of a host's addresses, and not for its name.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PAGE_TIMEOUT)
    return found


# --- pip's settings, which uv does not read -----------------------------------------------------------------------


def pip_settings(key):
    """What pip would use for `key` ("index-url"), strongest first: its environment variable, then its files."""
    import configparser

    home = os.path.expanduser("~")
    user = os.environ.get("XDG_CONFIG_HOME") or os.path.join(home, ".config")
    files = [os.path.join(sys.prefix, "pip.conf"), os.path.join(user, "pip", "pip.conf")]
    files += [os.path.join(home, ".pip", "pip.conf"), "/etc/pip.conf", "/etc/xdg/pip/pip.conf"]
    own = os.environ.get("PIP_CONFIG_FILE")
    if own:  # pip: /dev/null stands for "no files at all"
        files = [] if own == os.devnull else [own, *files]

    values = [os.environ.get("PIP_" + key.upper().replace("-", "_"))]
    for file in files:
        parser = configparser.RawConfigParser()
        parser.optionxform = lambda option: option.lower().replace("_", "-")
        try:
            parser.read(file)
        except configparser.Error as error:
            raise Refusal(f"{file} is not a pip.conf: {str(error).splitlines()[0]}") from None
        values += [parser.get(section, key, fallback=None) for section in ("install", "global")]
    return [value.strip() for value in values if value and value.strip()]


def index_url():
    """The package index as uv would be told it: uv's own variables, then pip's settings, then the public index."""
    for variable in ("UV_DEFAULT_INDEX", "UV_INDEX_URL"):
        if os.environ.get(variable):
            return re.sub(r"^[\w.-]+=", "", os.environ[variable])  # uv allows name=url
    return (pip_settings("index-url") or ["https://pypi.org/simple"])[0]


def bare(url):
    """The URL without its password, to be shown."""
    return re.sub("//[^/]*@", "//", url)


def settle_network():
    """Put pip's index and certificate where both uv and Python's own TLS look for them."""
    if pip_settings("index-url"):
        os.environ.setdefault("UV_DEFAULT_INDEX", index_url())
    certificate = os.environ.get("SSL_CERT_FILE") or (pip_settings("cert") or [""])[0]
    if certificate:
        os.environ["SSL_CERT_FILE"] = certificate
    else:
        # The system's certificates, which a company adds its own to, instead of the list built into uv.
        os.environ.setdefault("UV_SYSTEM_CERTS", "true")


def page_links(page):
    import urllib.parse

    html = download(page).decode("utf-8", "replace")
    return [urllib.parse.urljoin(page, link.replace("&amp;", "&")) for link in re.findall(r'href="([^"]+)"', html)]


def download(url):
    """The bytes at a URL. Raises OSError, and nothing else, when it cannot be had."""
    import base64
    import http.client
    import urllib.parse
    import urllib.request

    user = urllib.parse.urlsplit(url).netloc.rpartition("@")[0]
    request = urllib.request.Request(bare(url), headers={"Accept": "text/html"})
    if user:  # a private index; unredirected, so that it goes to nobody else
        secret = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", "Basic " + secret)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()
    except http.client.HTTPException as error:  # cut off half-way
        raise OSError(f"{type(error).__name__} {error}") from None


# --- installing ---------------------------------------------------------------------------------------------------


def install(asked):
    settle_network()
    variant, links = choose_variant(asked)
    uv = fetch_uv()
    check_space(variant, uv)
    lock = lock_file(variant)
    with open(lock) as file:
        packages = len(re.findall(r"^\w\S*==", file.read(), re.M))
    say(f"installing docker/{variant}.lock, {packages} packages, {VARIANTS[variant]} GB on disk, into {VENV}")

    text = mark_text(variant)  # taken now: if the lock is edited meanwhile, the next `make` rebuilds
    empty(VENV)
    # The base interpreter's own name: sys.executable may be a virtual environment that is active now.
    python = getattr(sys, "_base_executable", "") or sys.executable
    run_uv([uv, "venv", "--no-project", "--no-python-downloads", "--allow-existing", "--python", python, VENV], lock)
    command = [uv, "pip", "sync", "--python", VENV, "--require-hashes", "--only-binary", ":all:"]
    run_uv(command + (["--find-links", links] if links else []) + [lock], lock)
    write_whole(MARK, text.encode())
    say("done")


def empty(folder):
    """Remove what is in it, the mark first. The folder itself stays: it may be a link to a bigger disk."""
    os.makedirs(folder, exist_ok=True)
    for name in sorted(os.listdir(folder), key=lambda name: name != os.path.basename(MARK)):
        path = os.path.join(folder, name)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.remove(path)


def check_space(variant, uv):
    import subprocess

    cache = subprocess.run([uv, "cache", "dir"], stdout=subprocess.PIPE, check=True, text=True).stdout
    for place in (VENV, cache.strip()):  # one disk in most cases, and then the files are there once
        while not os.path.exists(place):
            place = os.path.dirname(place)
        need, free = VARIANTS[variant], shutil.disk_usage(place).free / 1e9
        if free < need:
            raise Refusal(
                f"{place} has {free:.1f} GB free and the {variant} packages need {need} GB: free some, "
                "or move the checkout (or uv's cache, UV_CACHE_DIR) to a bigger disk"
            )


def fetch_uv():
    """Returns the path of the uv that docker/bootstrap.lock pins, after fetching it into .cache if it is not there.

    Its wheel comes straight from the index, because a Debian python3 has neither pip nor ensurepip.
    """
    import hashlib
    import io
    import urllib.parse
    import zipfile

    with open(os.path.join(ROOT, "docker", "bootstrap.lock")) as lock:
        text = lock.read()
    version = re.search(r"^uv==(\S+)", text, re.M).group(1)
    uv = os.path.join(CACHE, "uv-" + version, "uv")
    if os.path.exists(uv):
        return uv

    page = index_url().rstrip("/") + "/uv/"
    shown = bare(page)
    say(f"fetching uv {version} (17 MB) from {shown}")
    try:
        name = re.compile(rf"uv-{re.escape(version)}-py3-none-manylinux\S*x86_64\S*\.whl")
        urls = [url.partition("#")[0] for url in page_links(page)]
        urls = [url for url in urls if name.fullmatch(urllib.parse.unquote(url.rsplit("/", 1)[-1]))]
        if not urls:
            raise Refusal(f"{shown} lists no uv {version} for Linux on x86_64: set PIP_INDEX_URL to an index that does")
        wheel = download(urls[0])
    except OSError as error:
        cause = getattr(error, "reason", None) or error
        raise Refusal(
            f"no answer from {shown} ({cause}): connect this machine, set PIP_INDEX_URL to an index in reach, "
            f"or put uv {version} at {uv}"
        ) from None
    found = hashlib.sha256(wheel).hexdigest()
    if f"sha256:{found}" not in text:
        raise Refusal(
            f"{shown} sent a uv {version} with sha256 {found}, which docker/bootstrap.lock does not list: "
            "do not use that index before you know why"
        )
    os.makedirs(os.path.dirname(uv), exist_ok=True)
    write_whole(uv, zipfile.ZipFile(io.BytesIO(wheel)).read(f"uv-{version}.data/scripts/uv"), executable=True)
    return uv


def run_uv(command, lock):
    """Run uv; on a terminal its progress shows. If it fails, its pages of causes become one line."""
    status, said = run_and_listen(command)
    if status == 0:
        return
    if status in (130, -2):  # Ctrl-C reached uv first
        raise KeyboardInterrupt
    said = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said)
    said = said[max(said.rfind("error:"), 0) :]
    package = (re.findall(r"[\w.-]+==[\w.+!]+", said) or ["a package"])[0]
    lock = os.path.relpath(lock, ROOT)
    if "os error 28" in said:
        raise Refusal(f"the disk of {VENV} or of uv's cache is full: free some space and run this again")
    if "Hash mismatch" in said:
        raise Refusal(
            f"{package} as it is served here is not the file that {lock} was made with (its sha256 differs): "
            "do not use that index before you know why"
        )
    if re.search("error sending request|Failed to fetch|Failed to download|dns error|timed out", said):
        url = (re.findall(r"https?://[^\s()`]+", said) or [index_url()])[0]
        raise Refusal(f"no answer from {bare(url)}: connect this machine, or set PIP_INDEX_URL to an index in reach")
    if "no wheels with a matching" in said:
        python = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise Refusal(f"{package} of {lock} has no wheel for Python {python} on this system: make PYTHON=python3.11")
    if re.search("there is no version of|was not found in the package registry", said):
        raise Refusal(f"{bare(index_url())} has no {package}, which {lock} lists: set PIP_INDEX_URL to one that has")
    raise Refusal(f"uv could not install {lock}: " + bare(" ".join(said.split())))


def run_and_listen(command):
    """Returns uv's exit status and what it said; on a terminal it keeps one, so that it draws its progress there."""
    if all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
        import pty

        heard = []

        def listen(terminal):
            heard.append(os.read(terminal, 4096))
            return heard[-1]

        status = pty.spawn(command, listen)
        return os.waitstatus_to_exitcode(status), b"".join(heard).decode("utf-8", "replace")
    import subprocess

    # close_fds: uv inherits the lock, which then holds until uv has ended, even if this process is killed.
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, close_fds=False, check=False)
    return done.returncode, done.stderr.decode("utf-8", "replace")


class only_one:
    """Two set-ups in one checkout would overwrite each other; the second waits for the first."""

    def __enter__(self):
        import fcntl

        os.makedirs(CACHE, exist_ok=True)
        self.file = open(os.path.join(CACHE, "setup.lock"), "w")
        os.set_inheritable(self.file.fileno(), True)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up is at work in this checkout; waiting for it")
            fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *error):
        self.file.close()


def say(line):
    print("setup: " + line, file=sys.stderr, flush=True)


def write_whole(path, data, executable=False):
    """Write a file's bytes aside and rename it, so that it is there whole or as it was before."""
    aside = path + ".new"
    try:
        with open(aside, "wb") as file:
            file.write(data)
        if executable:
            os.chmod(aside, 0o755)
        os.replace(aside, path)
    except OSError:  # a full disk
        if os.path.exists(aside):
            os.remove(aside)
        raise


def run_command(name, command, *words):
    """Run a script's main; what it refuses is one line, that the script of this name says, and an exit code."""
    try:
        command(*words)
    except Refusal as refusal:
        reason, code = refusal, refusal.exit_code
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a full or read-only disk, a folder of someone else
        reason, code = f"{error.filename or ROOT}: {error.strerror or error}", 3
    else:
        return
    print(f"{name}: {reason}", file=sys.stderr, flush=True)
    sys.exit(code)
