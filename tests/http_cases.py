"""HTTP requests, and what the server must decide about each of them.

The kinds are those of two public corpora: gunicorn's `tests/requests` and llhttp's `test/request`.
Names, values and bodies are our own. `source` says which files of them have a case of the same
kind; "own" marks what neither has. A case whose decision is not llhttp's strict one says why.
"""

from dataclasses import dataclass

Request = tuple[str, str, bytes]  # method, target, body

# How a connection goes on after the accepted requests. A set of statuses means: one refusal with
# one of them, and the connection is closed.
KEEP = "the connection stays open"
CLOSE = "the server closes"
CUT = "the last request is not complete: the server waits for the rest"

BAD = frozenset({400})
VERSION = frozenset({400, 505})
CODING = frozenset({400, 501})
METHOD = frozenset({400, 405, 501})
TARGET_LIMIT = frozenset({414, 431})
HEAD_LIMIT = frozenset({431})
BODY_LIMIT = frozenset({400, 413, 431})

# Why a decision is not llhttp's.
HOST = "HTTP/1.1 needs one valid Host field (RFC 9112 3.2); llhttp does not look at it"
ABSOLUTE = "the absolute form is reduced to path and query, so that routes see one form"
FORM = "only the origin form, http and https URLs and OPTIONS * name a resource here (RFC 9112 3.2)"
FRAGMENT = "a fragment is the client's own and is not sent (RFC 9112 3.2)"
USER = "user information in a target misleads readers (RFC 9110 4.2.4)"
TUNNEL = "CONNECT asks for a tunnel, which an origin server does not open"
UPGRADE = "an upgrade is ignored (RFC 9110 7.8); llhttp expects another protocol after the head"
HTTP_1 = "the service speaks HTTP/1.0 and 1.1 only; llhttp also takes a text head of 0.9 and 2.0"
CHUNKED_ONLY = "chunked is the only transfer coding that is decoded here (RFC 9112 6.1)"
CHUNKED_1_0 = "HTTP/1.0 has no transfer codings, so the framing is faulty (RFC 9112 6.1)"
CLOSE_WINS = "close wins over keep-alive in HTTP/1.0 too (RFC 9112 9.3)"
REPEATED = "two parties may choose differently between two values of this field"
TRAILER = "a trailer must not change framing or routing (RFC 9110 6.5.1)"
LIMIT = "llhttp has no limits"

LONG = "v" * 70_000  # over any limit for a head


@dataclass(frozen=True)
class Case:
    """Bytes of one connection, and what must become of them."""

    name: str
    source: str
    data: bytes
    accepted: tuple[Request, ...]
    end: str | frozenset[int] = KEEP
    differs: str = ""  # why the decision is not llhttp's


def message(line: str, *fields: str, host: str | None = "api.test", body: str = "") -> bytes:
    """A request from its lines. Characters are bytes (Latin-1)."""
    named = [] if host is None else [f"Host: {host}"]
    return ("\r\n".join([line, *named, *fields, "", ""]) + body).encode("latin-1")


def get(target: str, *fields: str, host: str | None = "api.test") -> bytes:
    return message(f"GET {target} HTTP/1.1", *fields, host=host)


def post(body: str, *fields: str) -> bytes:
    return message("POST /texts HTTP/1.1", *fields, body=body)


def sized(value: str, body: str = "abc") -> bytes:
    """A request with this Content-Length."""
    return post(body, f"Content-Length:{value}")


def coded(*fields: str) -> bytes:
    """A request with these fields and a chunked body."""
    return post("3\r\nabc\r\n0\r\n\r\n", *fields)


def chunks(body: str) -> bytes:
    return post(body, "Transfer-Encoding: chunked")


def first(line: str) -> bytes:
    """A chunked request whose first chunk of five bytes has this line before it."""
    return chunks(f"{line}hello\r\n0\r\n\r\n")


def trailer(text: str) -> bytes:
    return chunks(f"4\r\ndata\r\n0\r\n{text}\r\n")


def got(target: str, method: str = "GET") -> Request:
    return (method, target, b"")


def posted(body: bytes) -> Request:
    return ("POST", "/texts", body)


NEXT = get("/next")
ABC, HELLO, DATA = posted(b"abc"), posted(b"hello"), posted(b"data")
H2C = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAAA")

# A table: black would give each value a line of its own.
# fmt: off

REQUEST_LINES = [
    Case(
        "curl", "gunicorn valid/002; llhttp sample",
        get("/v", "User-Agent: curl/8.5", "Accept: */*"), (got("/v"),),
    ),
    Case(
        "browser", "gunicorn valid/003; llhttp sample",
        get(
            "/icon.svg", "User-Agent: Mozilla/5.0 (X11) Gecko/1", "Accept: text/html,*/*;q=0.7",
            "Accept-Language: de,en;q=0.3", "Keep-Alive: 60", "Connection: keep-alive",
        ),
        (got("/icon.svg"),),
    ),
    Case(
        "only Host", "gunicorn valid/006; llhttp sample", get("/plain/path"), (got("/plain/path"),),
    ),
    Case(
        "one more field", "gunicorn valid/007; llhttp sample", get("/one", "Accept: text/*"),
        (got("/one"),),
    ),
    Case(
        "no Host", "gunicorn valid/004-007; llhttp sample", get("/one", host=None), (), BAD, HOST,
    ),
    Case(
        "HTTP/1.0 without Host", "gunicorn valid/015, 019", message("GET /old HTTP/1.0", host=None),
        (got("/old"),), CLOSE,
    ),
    Case(
        "HTTP/1.0 benchmark client", "gunicorn valid/015; llhttp sample",
        message("GET /old HTTP/1.0", "User-Agent: Bench/1"), (got("/old"),), CLOSE,
    ),
    Case(
        "HTTP/1.0 with a body", "gunicorn valid/001, http10_cl",
        message(
            "PUT /put?a=b HTTP/1.0", "Content-Type: application/json", "Content-Length: 9",
            body='{"n": 42}',
        ),
        (("PUT", "/put?a=b", b'{"n": 42}'),), CLOSE,
    ),
    *(
        Case(
            f"method {method}", "llhttp method", message(f"{method} /thing HTTP/1.1"),
            (got("/thing", method),),
        )
        for method in (
            "PATCH", "DELETE", "HEAD", "OPTIONS", "PURGE", "SEARCH", "LINK", "UNLINK", "SOURCE",
            "REPORT",
        )
    ),
    Case(
        "QUERY with a body", "llhttp method",
        message("QUERY /people HTTP/1.1", "Content-Length: 8", body="select 1"),
        (("QUERY", "/people", b"select 1"),),
    ),
    Case(
        "M-SEARCH *", "llhttp method", message("M-SEARCH * HTTP/1.1", 'MAN: "x"'), (), METHOD, FORM,
    ),
    Case("unknown method", "llhttp invalid", message("PATCHWORK / HTTP/1.1"), (), METHOD),
    *(
        Case(f"method {method!r}", source, message(f"{method} /x HTTP/1.1"), (), METHOD)
        for method, source in (
            ("get", "gunicorn valid/031compat"), ("-GO", "gunicorn invalid/003c, valid/031"),
            ("g:o", "gunicorn invalid/003b"), ("GET:", "gunicorn invalid/prefix_05"),
            ("GET\0", "gunicorn invalid/prefix_02"), ("PUT\0GET", "gunicorn invalid/prefix_01"),
            ("GET\xdf", "gunicorn invalid/nonascii_01"),
            ("PUT\xff", "gunicorn invalid/nonascii_02"), (" GET", "own"), ("\tGET", "own"),
        )
    ),
    Case("no target", "gunicorn invalid/002", message("POST HTTP/1.1"), (), BAD),
    Case("parts divided by LF", "gunicorn invalid/003", message("POST\n/\nHTTP/1.1"), (), METHOD),
    Case("parts divided by tabs", "own", message("GET\t/\tHTTP/1.1"), (), METHOD),
    Case("more spaces between parts", "own", message("GET   /x  HTTP/1.1"), (got("/x"),)),
    Case(
        "LF after the request line", "llhttp invalid", b"GET /x HTTP/1.1\nHost: a\r\n\r\n", (), BAD,
    ),
    Case(
        "CR after the request line", "llhttp sample", b"GET /x HTTP/1.1\rHost: a\r\n\r\n", (), BAD,
    ),
    Case(
        "space after the version", "llhttp transfer-encoding", message("GET /x HTTP/1.1 "), (), BAD,
    ),
    Case("no version", "llhttp sample", b"GET /x\r\n\r\n", (), VERSION, HTTP_1),
    Case(
        "no version, with fields", "llhttp sample", b"GET /x\r\nHost: a\r\n\r\n", (), VERSION,
        HTTP_1,
    ),
    *(
        Case(f"version {version}", source, message(f"GET /x {version}"), (), VERSION, differs)
        for version, source, differs in (
            ("HTTP/0.9", "own", HTTP_1), ("HTTP/2.0", "gunicorn invalid/version_02", HTTP_1),
            ("HTTP/0.98", "gunicorn invalid/version_01", ""), ("HTTP/6.7", "llhttp invalid", ""),
            ("HTTP/1.2", "own", ""), ("HTTP/112", "gunicorn invalid/018", ""),
            ("HTTP/2", "own", ""), ("HTTP/" + "2" * 60 + ".1", "gunicorn invalid/prefix_06", ""),
            ("http/1.1", "own", ""), ("HTTP/1.1x", "own", ""),
            ("GTP/1.1", "gunicorn invalid/004", ""), ("XHTTP/1.0", "llhttp invalid", ""),
            ("ICE/1.0", "llhttp invalid", ""),
        )
    ),
    Case("PUT of RTSP", "llhttp invalid", message("PUT /film RTSP/1.0"), (), BAD),
    Case("ANNOUNCE of HTTP", "llhttp invalid", message("ANNOUNCE /film HTTP/1.1"), (), METHOD),
    # httptools does not tell RTSP/1.0 and ICE/1.0 from HTTP/1.0. The framing is the same.
    Case(
        "ANNOUNCE of RTSP", "llhttp method", message("ANNOUNCE /film RTSP/1.0"),
        (got("/film", "ANNOUNCE"),), CLOSE,
    ),
    Case(
        "OPTIONS of RTSP", "llhttp method", message("OPTIONS /film RTSP/1.0"),
        (got("/film", "OPTIONS"),), CLOSE,
    ),
    Case(
        "SOURCE of ICE", "llhttp method", message("SOURCE /song ICE/1.0"),
        (got("/song", "SOURCE"),), CLOSE,
    ),
    Case("PRI without the preface", "llhttp method", message("PRI * HTTP/1.1"), (), BAD),
    Case("HTTP/2 preface", "own", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", (), BAD),
    Case("TLS", "own", b"\x16\3\1\0\xa5\1\0\0\xa1\3\3", (), METHOD),
    Case("a response", "own", b"HTTP/1.1 204 No Content\r\n\r\n", (), METHOD),
    Case(
        "PROXY line", "gunicorn invalid/pp_01-03, valid/pp_01, pp_02",
        b"PROXY TCP4 10.0.0.1 10.0.0.2 5001 80\r\n" + NEXT, (), METHOD,
    ),
    Case(
        "PROXY header, version 2", "gunicorn valid/pp_04, pp_05",
        b"\r\n\r\n\0\r\nQUIT\n!\x11\0\x0c" + NEXT, (), METHOD,
    ),
    Case("CRLF before the request", "llhttp sample", b"\r\n" + NEXT, (got("/next"),)),
    Case("many empty lines before the request", "own", b"\r\n\n\r\r\n" + NEXT, (got("/next"),)),
    Case("byte order mark before the request", "own", b"\xef\xbb\xbf" + NEXT, (), METHOD),
]

TARGETS = [
    *(
        Case(f"target {target}", source, get(target), (got(target),))
        for target, source in (
            ('/"quoted"?as="text"', "gunicorn valid/014; llhttp uri"),
            ("/find?a=b?c", "llhttp uri, url"), ("/find?a=|", "llhttp uri"),
            ("///three", "gunicorn valid/100"), ("/%41%20b", "gunicorn valid/027; llhttp url"),
            ("/a/../b", "own"), ("/%zz", "own"), ("/" + "t" * 2000, "gunicorn valid/024"),
        )
    ),
    *(
        Case(
            f"target {target}", source, get(target, host="unit.test:81"), (got(reduced),), KEEP,
            ABSOLUTE,
        )
        for target, reduced, source in (
            ("http://unit.test:81/a?b=c", "/a?b=c", "gunicorn valid/target_absolute; llhttp url"),
            ("https://unit.test/a", "/a", "gunicorn valid/target_absolute_https"),
            ("http://[::1]:81/a", "/a", "gunicorn valid/target_absolute_ipv6; llhttp url"),
            ("http://unit.test:81", "/", "llhttp uri"),
            ("http://unit.test?b=c", "/?b=c", "llhttp uri"),
            ("http://unit.test:81?b=c", "/?b=c", "llhttp uri"), ("HTTP://UNIT.test/A", "/A", "own"),
            ("http://other.test/a", "/a", "own"),
        )
    ),
    *(
        Case(f"target {target!r}", source, get(target), (), BAD, differs)
        for target, source, differs in (
            ("*", "gunicorn invalid/target_asterisk_non_options", FORM),
            ("ftp://unit.test/a", "own", FORM), ("http:///a", "own", FORM),
            ("/page?n=2#line-7", "gunicorn valid/005; llhttp uri, url", FRAGMENT),
            ("http://unit.test/#end", "llhttp url", FRAGMENT),
            ("http://me:pw@a.test/", "gunicorn valid/target_absolute_userinfo; llhttp uri", USER),
            ("unit.test:443", "gunicorn invalid/target_authority_non_connect", ""),
            ("a/b", "gunicorn invalid/target_relative; llhttp url", ""), ("?a=b", "own", ""),
            ("t://]a/:", "gunicorn invalid/016", FORM), ("x:/a", "llhttp url", ""),
            ("/a b", "llhttp uri", ""), ("/caf\xc3\xa9", "gunicorn valid/027; llhttp uri", ""),
            ("/a\tb", "llhttp url", ""), ("/a\fb", "llhttp url", ""), ("/a\0b", "own", ""),
            ("/a\x7fb", "own", ""),
        )
    ),
    Case("absolute form without Host", "own", get("http://unit.test/", host=None), (), BAD, HOST),
    Case(
        "OPTIONS *", "gunicorn valid/target_asterisk_options", message("OPTIONS * HTTP/1.1"),
        (got("*", "OPTIONS"),),
    ),
    *(
        Case(
            f"CONNECT {target}", source, message(f"CONNECT {target} HTTP/1.1", host=target), (),
            METHOD, TUNNEL,
        )
        for target, source in (
            ("unit.test:443", "gunicorn valid/target_authority_connect; llhttp method"),
            ("UNIT.TEST:443", "llhttp method"),
            ("[::1]:443", "gunicorn valid/target_authority_ipv6"), ("a_b.test:80", "llhttp uri"),
        )
    ),
    Case(
        "CONNECT with a body", "llhttp method",
        message("CONNECT a.test:80 HTTP/1.0", "Content-Length: 3", body="abc"), (), METHOD, TUNNEL,
    ),
    Case(
        "CONNECT and what follows", "llhttp method", message("CONNECT a.test:80 HTTP/1.1") + NEXT,
        (), METHOD, TUNNEL,
    ),
]

FIELDS = [
    Case(
        "value without a space before it", "gunicorn valid/004; llhttp sample",
        get("/x", "nnnnn:+++++"), (got("/x"),),
    ),
    Case("empty values", "own", get("/x", "A:", "B: \t ", "C: c"), (got("/x"),)),
    Case(
        "white space around a value", "gunicorn valid/padding_01, htab_trim",
        get("/x", "Name: \t a b \t ", "Tab:\tc\t"), (got("/x"),),
    ),
    Case(
        "a field twice", "gunicorn valid/017",
        get("/x", "If-Match: one", "If-Match: two", "Cookie: a=b", "Cookie: c=d"), (got("/x"),),
    ),
    Case(
        "every character of a name", "gunicorn valid/field_name_special_chars",
        get("/x", "X!#$%&'*+-.^_`|~9: a"), (got("/x"),),
    ),
    Case(
        "bytes over 127 in a value", "gunicorn valid/obs_text; llhttp sample",
        get("/x", "City: D\xfcren", "Last: \xff"), (got("/x"),),
    ),
    Case(
        "names with underscores", "gunicorn invalid/040, valid/040, valid/040_compat",
        post("abc", "Transfer_Encoding: none", "Content-Length: 3", "Content_Length: -9"), (ABC,),
    ),
    Case(
        "contradicting forwarded fields", "gunicorn invalid/019",
        get("/x", "X-Forwarded-Proto: https", "X-Forwarded-Ssl: off"), (got("/x"),),
    ),
    *(
        Case(f"field {line!r}", source, get("/x", line), (), BAD)
        for line, source in (
            ("N\0: v", "gunicorn invalid/005"), ("N\1: v", "llhttp invalid"),
            ("N@: v", "llhttp invalid"), ("N v: w", "own"), ("N : v", "own"), ("N\t: v", "own"),
            (": v", "llhttp invalid"), ("no colon", "own"),
            ("Content-Length\xdf: 3", "gunicorn invalid/nonascii_03"),
            ("Content-Length\xff: 3", "gunicorn invalid/nonascii_04"),
            ("Connection\r\x1b\x35ep: x", "llhttp invalid"),
            ("X-Some\r\x1b\xd5: x", "llhttp invalid"),
            ("Content\rLength: 3", "llhttp content-length"), ("N: a\0b", "own"),
            ("N: a\7b", "gunicorn invalid/ctl_bel; llhttp lenient-headers"),
            ("N: a\x7fb", "gunicorn invalid/ctl_del"), ("N: \f", "llhttp lenient-headers"),
            ("N: a\rM: b", "llhttp invalid"), ("N:\rM: b", "llhttp invalid"),
            ("N: a\nM: b", "gunicorn invalid/invalid_field_value_01; llhttp invalid"),
            ("N:\nM: b", "llhttp invalid"), ("N: a\r\r", "own"),
            ("Connection: keep\ralive", "llhttp connection"),
            ("N: a\nContent-Length: 23", "llhttp invalid"),
            (
                "N: one\r\n two",
                "gunicorn invalid/obs_fold_01, valid/compat_obs_fold; llhttp sample",
            ),
            ("N: one\r\n\ttwo", "gunicorn valid/compat_obs_fold_huge; llhttp sample"),
            ("N:\r\n one", "gunicorn invalid/013; llhttp sample"), ("N\r\n : v", "llhttp invalid"),
            (" ", "own"), ("A: b\r\n Content-Length: 3", "llhttp invalid"),
            ("Connection: close,\r\n keep-alive", "llhttp connection"),
            ("Connection : close", "llhttp connection"),
        )
    ),
    Case(
        "space before the first field", "llhttp invalid", b"GET /x HTTP/1.1\r\n Host: a\r\n\r\n",
        (), BAD,
    ),
    Case("LF for every line", "llhttp invalid, sample", b"GET /x HTTP/1.1\nHost: a\n\n", (), BAD),
    Case("LF for the last line", "own", b"GET /x HTTP/1.1\r\nHost: a\r\n\n", (), BAD),
    Case(
        "CR and other bytes for the last line", "llhttp invalid",
        b"GET /x HTTP/1.1\r\nHost: a\r\n\rZGET /y HTTP/1.1\r\nHost: a\r\n\r\n", (), BAD,
    ),
    Case(
        "CR before the body", "llhttp content-length",
        b"PUT /x HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\rabc", (), BAD,
    ),
    *(
        Case(f"Host {host!r}", source, get("/x", host=host), (got("/x"),))
        for host, source in (
            ("10.0.0.1=80", "gunicorn valid/002; llhttp sample"),
            ("[::1]:8080", "gunicorn valid/target_absolute_ipv6"), ("a_b.test", "llhttp uri"),
            ("127.0.0.1:80", "own"), ("A.test.", "own"),
        )
    ),
    *(
        Case(f"Host {host!r}", "own", get("/x", host=host), (), BAD, HOST)
        for host in (
            "a b", "a/b", "me@a", "a:b", "a:80:81", "[::1", "::1", "http://a", "caf\xe9", "a?b",
            "a\tb",
        )
    ),
    *(
        Case(
            f"{name} twice", source, get("/x", f"{name}: {value}", f"{name.lower()}: {value}"), (),
            BAD, reason,
        )
        for name, value, source, reason in (
            ("Host", "api.test", "gunicorn invalid/042", HOST),
            ("Content-Type", "text/plain", "gunicorn invalid/041", REPEATED),
            ("Authorization", "Bearer k", "own", REPEATED), ("X-API-Key", "k", "own", REPEATED),
        )
    ),
    Case("a second Host", "gunicorn invalid/042", get("/x", "Host: evil.test"), (), BAD, HOST),
    Case(
        "a long value", "gunicorn invalid/007, 010-012, 017, limit_header_default",
        get("/x", f"Long: {LONG}"), (), HEAD_LIMIT, LIMIT,
    ),
    Case(
        "long fields of one name", "gunicorn invalid/008",
        get("/x", f"Long: {LONG}", f"Long: {LONG}"), (), HEAD_LIMIT, LIMIT,
    ),
    Case("a long name", "own", get("/x", f"{LONG}: a"), (), HEAD_LIMIT, LIMIT),
    Case(
        "many fields", "gunicorn invalid/009, 011",
        get("/x", *(f"F{number}: v" for number in range(5000))), (), HEAD_LIMIT, LIMIT,
    ),
    Case("a long target", "gunicorn invalid/006", get(f"/{LONG}"), (), TARGET_LIMIT, LIMIT),
    Case(
        "a value of 3,000 bytes", "gunicorn valid/024, 026", get("/x", f"Long: {LONG[:3000]}"),
        (got("/x"),),
    ),
]

BODIES = [
    *(
        Case(f"Content-Length:{value}", source, sized(value), (ABC,))
        for value, source in (
            (" 3", "own"), ("3", "own"), ("  3 ", "llhttp content-length"),
            ("\t3\t ", "llhttp content-length"), (" 003", "llhttp content-length"),
        )
    ),
    # Python's int() takes at most 4,300 digits.
    *(
        Case(
            f"Content-Length of {digits} digits", "own", sized(f" {3:0{digits}}"), (),
            BAD | HEAD_LIMIT, LIMIT,
        )
        for digits in (40, 5000)
    ),
    Case(
        "Content-Length in any case", "gunicorn valid/008; llhttp content-length",
        post("abc", "conTENT-lenGTH: 3"), (ABC,),
    ),
    Case(
        "Content-Length and more fields", "llhttp content-length",
        post("abc", "Content-Length: 003", "Ohm: watt"), (ABC,),
    ),
    Case(
        "Content-Length 0", "gunicorn valid/get_cl_zero, pp_03", get("/x", "Content-Length: 0"),
        (got("/x"),),
    ),
    Case("POST without a body", "own", post(""), (posted(b""),)),
    Case(
        "GET with a body", "gunicorn valid/get_cl_nonzero",
        message("GET /x HTTP/1.1", "Content-Length: 5", body="world"), (("GET", "/x", b"world"),),
    ),
    Case(
        "HEAD with a body", "own", message("HEAD /x HTTP/1.1", "Content-Length: 2", body="{}"),
        (("HEAD", "/x", b"{}"),),
    ),
    Case(
        "form", "gunicorn valid/099",
        post(
            '--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--b--',
            "Content-Type: multipart/form-data; boundary=b", "Content-Length: 57",
        ),
        (posted(b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--b--'),),
    ),
    Case(
        "the body is a request", "gunicorn valid/020",
        post(NEXT.decode(), f"Content-Length: {len(NEXT)}"), (posted(NEXT),),
    ),
    Case(
        "Expect: 100-continue", "own", post("abc", "Expect: 100-continue", "Content-Length: 3"),
        (ABC,),
    ),
    *(
        Case(f"Content-Length:{value!r}", source, sized(value), (), BAD)
        for value, source in (
            (" -1", "gunicorn invalid/014"), (" bla-bla", "gunicorn invalid/015"),
            (" -0", "gunicorn invalid/022"), (" 0_3", "gunicorn invalid/023"),
            (" +3", "gunicorn invalid/024"), (" 0x3", "own"),
            (" 0 3", "gunicorn invalid/prefix_03; llhttp content-length"),
            (" 3 1", "gunicorn invalid/prefix_04; llhttp content-length"),
            (" 3, 3", "gunicorn invalid/cl_list_form"), (" 3,4", "own"),
            ("", "llhttp content-length"), (" ", "llhttp content-length"), (" 3;", "own"),
            (" 3.0", "own"), (' "3"', "own"), (" \xb3", "own"), (" 3\v", "own"),
            (" 3\r\n 4", "own"), (" 2000000000000000000000", "llhttp content-length"),
            (" 18446744073709551616", "llhttp content-length"),
        )
    ),
    Case(
        "Content-Length of 2^64 - 1", "own", sized(" 18446744073709551615"), (), BODY_LIMIT, LIMIT,
    ),
    Case(
        "space after Content-Length", "gunicorn invalid/020, valid/028; llhttp content-length",
        post("abc", "Content-Length : 3"), (), BAD,
    ),
    Case(
        "Content-Length twice, different", "gunicorn invalid/021; llhttp content-length",
        post("abc", "Content-Length: 3", "Content-Length: 2"), (), BAD,
    ),
    Case(
        "Content-Length twice, equal", "own",
        post("abc", "Content-Length: 3", "N: v", "content-length: 3"), (), BAD,
    ),
    *(
        Case(
            f"Content-Length and {value}", source,
            post("0\r\n\r\n", "Content-Length: 5", f"Transfer-Encoding:{value}"), (), BAD,
        )
        for value, source in (
            (" chunked", "gunicorn invalid/cl_te_chunked"),
            (" \tchunked", "gunicorn invalid/chunked_02"),
            (" identity", "gunicorn valid/009; llhttp content-length"),
            ("", "llhttp transfer-encoding"),
        )
    ),
    Case(
        "Transfer-Encoding and Content-Length", "llhttp transfer-encoding",
        coded("Transfer-Encoding: chunked", "Content-Length: 3"), (), BAD,
    ),
    *(
        Case(f"Transfer-Encoding: {value}", source, coded(f"Transfer-Encoding: {value}"), (ABC,))
        for value, source in (
            ("chunked", "gunicorn valid/010; llhttp transfer-encoding"), ("CHUNKED", "own"),
            ("\tChunked ", "own"),
        )
    ),
    Case(
        "GET with chunks", "gunicorn valid/029, 030",
        message("GET /x HTTP/1.1", "Transfer-Encoding: chunked", body="2\r\nhi\r\n0\r\n\r\n"),
        (("GET", "/x", b"hi"),),
    ),
    Case(
        "a name like Transfer-Encoding", "gunicorn invalid/chunked_07",
        coded("Transfer_Encoding: gzip", "Transfer-Encoding: chunked"), (ABC,),
    ),
    *(
        Case(
            f"Transfer-Encoding {value!r}", source,
            coded(*(f"Transfer-Encoding: {each}" for each in value.split("|"))), (), CODING, reason,
        )
        for value, source, reason in (
            (
                "gzip, chunked", "gunicorn valid/gzip_chunked; llhttp transfer-encoding",
                CHUNKED_ONLY,
            ),
            ("gzip|chunked", "gunicorn valid/025; llhttp transfer-encoding", CHUNKED_ONLY),
            ("gzip,chunked", "gunicorn valid/025_line", CHUNKED_ONLY),
            ("identity, chunked", "gunicorn valid/te_identity_chunked", CHUNKED_ONLY),
            ("identity|chunked", "gunicorn valid/029, 030", CHUNKED_ONLY),
            (",chunked", "own", CHUNKED_ONLY), ("chunked, gzip", "llhttp transfer-encoding", ""),
            ("chunked|gzip", "gunicorn invalid/chunked_06; llhttp transfer-encoding", ""),
            ("chunked|identity", "gunicorn invalid/chunked_08", ""),
            ("identity, chunked, identity, chunked", "gunicorn invalid/chunked_03", ""),
            ("identity|chunked|identity|chunked", "gunicorn invalid/chunked_04", ""),
            ("chunked|chunked", "own", ""), ("chunked,", "own", ""),
            ("chunkedchunked", "llhttp transfer-encoding", ""),
            ("doves", "llhttp transfer-encoding", ""), ("identity", "llhttp transfer-encoding", ""),
            ("gzip", "own", ""), ("", "llhttp transfer-encoding", ""), ("chunked;q=1", "own", ""),
            ('"chunked"', "own", ""), ("chu nked", "own", ""), ("chunked\v", "own", ""),
            ("chunked\t", "own", ""), ("chunked\r\n  abc", "llhttp transfer-encoding", ""),
        )
    ),
    Case(
        "chunks in HTTP/1.0", "gunicorn invalid/chunked_05",
        message("POST /texts HTTP/1.0", "Transfer-Encoding: chunked", body="3\r\nabc\r\n0\r\n\r\n"),
        (), CODING, CHUNKED_1_0,
    ),
]

CHUNKS = [
    *(
        Case(f"chunk line {line!r}", source, first(line), (HELLO,))
        for line, source in (
            ("5\r\n", "own"), ("0005\r\n", "gunicorn valid/size_leading_zeros"),
            ("5;a\r\n", "llhttp transfer-encoding"),
            ("5;a;b=c;d=e\r\n", "llhttp transfer-encoding"),
            ('5;a="b c; d"\r\n', "gunicorn valid/ext_quoted; llhttp transfer-encoding"),
            ('5;a="b \\"c\\" \\\\";d\r\n', "llhttp transfer-encoding"),
            # The grammar has neither, but extensions are ignored: nothing depends on them.
            ("5;a=\r\n", "own"), ("5;=b\r\n", "own"),
        )
    ),
    *(
        Case(f"chunk line {line!r}", source, first(line), (), BAD)
        for line, source in (
            ("5 \r\n", "llhttp transfer-encoding"), ("5\t\r\n", "own"),
            ("5;\r\n", "llhttp transfer-encoding"), ("5;;;\r\n", "own"), ("5;\0\r\n", "own"),
            # RFC 9112 7.1.1 allows spaces beside a semicolon for the sake of old senders.
            ("5; some; text=b\r\n", "gunicorn valid/013"), ("5 ;a=b\r\n", "own"),
            ("5 abc\r\n", "llhttp transfer-encoding"), ('5;a="b\r\n', "llhttp transfer-encoding"),
            ('5;a="b"c\r\n', "own"), ('5;a="\\\1"\r\n', "own"), ("5;a=b c\r\n", "own"),
            ("5;a=\xe9\r\n", "own"), ("5;a=b\rc\r\n", "gunicorn invalid/chunked_14"),
            ("5;a=b\n", "llhttp invalid"), ('5;a="b\nc"\r\n', "own"), ("5\n", "llhttp invalid"),
            ("5\n;\r\n", "gunicorn invalid/chunked_11"),
            ("5\r\r;abc\r\n", "llhttp transfer-encoding"),
            ("5 \n  \r\n", "llhttp transfer-encoding"),
            ("+5\r\n", "gunicorn invalid/size_plus_sign"),
            ("-5\r\n", "gunicorn invalid/size_minus_sign"), ("0x5\r\n", "own"),
            ("0_5\r\n", "gunicorn invalid/chunked_01"), ("5g\r\n", "own"), ("\xb5\r\n", "own"),
            (" 5\r\n", "gunicorn invalid/chunked_10"), ("\r\n", "gunicorn invalid/chunked_13"),
            (" ;a=b\r\n", "gunicorn invalid/chunked_12"), ("1" * 17 + "\r\n", "own"),
        )
    ),
    Case(
        "lowercase size", "llhttp transfer-encoding", chunks("b\r\nhello there\r\n0\r\n\r\n"),
        (posted(b"hello there"),),
    ),
    Case(
        "uppercase size", "gunicorn valid/size_uppercase_hex; llhttp transfer-encoding",
        chunks("B\r\nhello there\r\n0\r\n\r\n"), (posted(b"hello there"),),
    ),
    Case(
        "two digits", "gunicorn valid/010; llhttp transfer-encoding",
        chunks("1a\r\nthis is a chunk of 26 bytes\r\n0\r\n\r\n".replace("this ", "thi ")),
        (posted(b"thi is a chunk of 26 bytes"),),
    ),
    Case(
        "two chunks, last of zeros", "gunicorn valid/011; llhttp transfer-encoding",
        chunks("3\r\nabc\r\n4\r\n def\r\n000\r\n\r\n"), (posted(b"abc def"),),
    ),
    Case("empty body", "llhttp pausing", chunks("0\r\n\r\n"), (posted(b""),)),
    Case("an extension of the last chunk", "own", chunks("0;a=b\r\n\r\n"), (posted(b""),)),
    Case(
        "space after the last size", "gunicorn invalid/chunked_09; llhttp transfer-encoding",
        chunks("4\r\ndata\r\n0 \r\n\r\n"), (), BAD,
    ),
    Case(
        "no CRLF after the data", "llhttp transfer-encoding", chunks("5\r\nhello0\r\n\r\n"), (),
        BAD,
    ),
    Case("LF after the data", "own", chunks("5\r\nhello\n0\r\n\r\n"), (), BAD),
    Case("CR after the data", "own", chunks("5\r\nhello\r0\r\n\r\n"), (), BAD),
    Case("more data than the size says", "own", chunks("4\r\nhello\r\n0\r\n\r\n"), (), BAD),
    Case("a chunk of 2^64 - 1 bytes", "own", chunks("ffffffffffffffff\r\nhello"), (), CUT),
    Case("no last chunk", "llhttp transfer-encoding", chunks("3\r\nfoo\r\n"), (), CUT),
    Case(
        "nothing after the last chunk", "gunicorn invalid/missing_final_crlf", chunks("0\r\n"), (),
        CUT,
    ),
    Case(
        "a request instead of the last line", "own",
        chunks("5\r\nhello\r\n0\r\n" + get("/smuggled").decode()), (), BAD,
    ),
    Case("LF instead of the last line", "own", chunks("0\r\n\n"), (), BAD),
    Case("CR and a byte instead of the last line", "own", chunks("0\r\n\rX"), (), BAD),
    Case(
        "trailers are dropped", "gunicorn valid/012; llhttp transfer-encoding",
        trailer("Vary: *\r\nX-Sum: 7\r\nX-Empty:\r\n"), (DATA,),
    ),
    *(
        Case(f"trailer {line!r}", source, trailer(f"{line}\r\n"), (), BAD, reason)
        for line, source, reason in (
            ("Content-Length: 9", "gunicorn invalid/trailer_forbidden_cl", ""),
            ("Transfer-Encoding: chunked", "gunicorn invalid/trailer_forbidden_te", ""),
            ("Host: evil.test", "gunicorn invalid/trailer_forbidden_host", TRAILER),
            ("X Y: a", "own", ""), ("X : a", "own", ""), ("X: a\r\n b", "own", ""),
            ("X: a\nY: b", "own", ""), (": a", "own", ""), ("X: \1", "own", ""),
        )
    ),
    Case("long trailers", "own", trailer(f"X: {LONG}\r\n"), (), BODY_LIMIT, LIMIT),
    Case("a long extension", "own", first(f"5;a={LONG}\r\n"), (), BODY_LIMIT, LIMIT),
]

CONNECTIONS = [
    Case("two requests", "gunicorn valid/018", get("/1") + get("/2"), (got("/1"), got("/2"))),
    Case(
        "keep-alive asked for", "llhttp connection",
        get("/1", "Connection: keep-alive") + get("/2", "Connection: Keep-Alive"),
        (got("/1"), got("/2")),
    ),
    Case(
        "three requests with bodies", "llhttp pipelining",
        sized(" 3") + sized(" 4", "data") + sized(" 5", "hello"), (ABC, DATA, HELLO),
    ),
    Case(
        "chunks, then a request", "gunicorn valid/023", chunks("3\r\nabc\r\n00\r\n\r\n") + NEXT,
        (ABC, got("/next")),
    ),
    Case(
        "CRLF after a body", "llhttp connection", sized(" 3", "abc\r\n") + NEXT,
        (ABC, got("/next")),
    ),
    Case(
        "a body longer than its Content-Length", "own", sized(" 3", "abcdef\r\n\r\n"), (ABC,),
        METHOD,
    ),
    Case(
        "a good request, then a bad one", "own", get("/1") + get("/2", "N : v"), (got("/1"),), BAD,
    ),
    Case(
        "chunks, then a bad request", "gunicorn invalid/chunked_01",
        chunks("3\r\nabc\r\n0\r\n\r\n") + post("", "Transfer-Encoding: identity"), (ABC,), CODING,
    ),
    Case("100 requests", "own", get("/1") * 100, (got("/1"),) * 100),
    Case(
        "HTTP/1.0 closes", "gunicorn valid/019; llhttp connection",
        message("GET /1 HTTP/1.0") + NEXT, (got("/1"),), CLOSE,
    ),
    Case(
        "HTTP/1.0 with keep-alive", "gunicorn valid/022",
        message("GET /1 HTTP/1.0", "Connection: Keep-Alive") + NEXT, (got("/1"), got("/next")),
    ),
    *(
        Case(f"Connection: {value!r}", source, get("/1", f"Connection: {value}"), (got("/1"),), end)
        for value, source, end in (
            ("close", "llhttp connection", CLOSE), ("Close", "gunicorn valid/021", CLOSE),
            ("close\t", "llhttp connection", CLOSE), ("close ", "llhttp transfer-encoding", CLOSE),
            ("x,close", "own", CLOSE), (" , close", "own", CLOSE),
            ("close, token, upgrade, keep-alive", "llhttp connection", CLOSE),
            ("keep-alive, close", "own", CLOSE), ("keep-alive\r\nConnection: close", "own", CLOSE),
            ("close\r\nConnection: keep-alive", "own", CLOSE), ("closed", "own", KEEP),
            ("close x", "own", KEEP), ("", "own", KEEP), ("upgrade", "own", KEEP),
        )
    ),
    *(
        Case(
            f"HTTP/1.0, Connection: {value!r}", "own",
            message("GET /1 HTTP/1.0", f"Connection: {value}"), (got("/1"),), CLOSE, reason,
        )
        for value, reason in (
            ("close", ""), ("upgrade", ""), ("keep-alive, close", CLOSE_WINS),
            ("close, keep-alive", CLOSE_WINS), ("close\r\nConnection: keep-alive", CLOSE_WINS),
        )
    ),
    Case(
        "close, then a request", "gunicorn valid/021", get("/1", "Connection: Close") + NEXT,
        (got("/1"),), CLOSE,
    ),
    Case(
        "close with a body, then a request", "llhttp connection",
        post("abc\r\n", "Content-Length: 3", "Connection: close") + NEXT, (ABC,), CLOSE,
    ),
    Case(
        "close with chunks, then bytes", "own",
        coded("Connection: close", "Transfer-Encoding: chunked") + b"\0\1\2", (ABC,), CLOSE,
    ),
    Case("Upgrade without Connection", "own", get("/1", "Upgrade: h2c"), (got("/1"),)),
    *(
        Case(
            f"upgrade to {protocol}", source,
            get("/1", "Connection: keep-alive, Upgrade", f"Upgrade: {protocol}") + NEXT,
            (got("/1"), got("/next")), KEEP, UPGRADE,
        )
        for protocol, source in (
            ("websocket", "llhttp connection"), ("ws", "llhttp connection"),
            ("HTTP/2.0", "llhttp connection"),
        )
    ),
    Case(
        "bytes of the other protocol", "llhttp connection",
        get("/1", "Connection: upgrade", "Upgrade: WebSocket") + b"\x81\5hello", (got("/1"),),
        METHOD, UPGRADE,
    ),
    Case(
        "h2c of Java's client", "own", get("/1", *H2C) + NEXT, (got("/1"), got("/next")), KEEP,
        UPGRADE,
    ),
    Case(
        "h2c with Content-Length", "llhttp connection",
        post("abc", *H2C, "Content-Length: 3") + NEXT, (ABC, got("/next")), KEEP, UPGRADE,
    ),
    Case(
        "h2c with Content-Length first", "own", post("abc", "Content-Length: 3", *H2C) + NEXT,
        (ABC, got("/next")), KEEP, UPGRADE,
    ),
    Case(
        "h2c with chunks", "own", coded(*H2C, "Transfer-Encoding: chunked") + NEXT,
        (ABC, got("/next")), KEEP, UPGRADE,
    ),
    Case(
        "h2c with a request as its body", "own",
        post(NEXT.decode(), *H2C, f"Content-Length: {len(NEXT)}"), (posted(NEXT),), KEEP, UPGRADE,
    ),
    Case(
        "h2c twice, with bodies", "own",
        post("abc", *H2C, "Content-Length: 3") + post("data", *H2C, "Content-Length: 4"),
        (ABC, DATA), KEEP, UPGRADE,
    ),
    Case(
        "h2c with a bad chunk", "own", post("5 \r\nhello\r\n", *H2C, "Transfer-Encoding: chunked"),
        (), BAD, UPGRADE,
    ),
    Case(
        "h2c with a framing field as a trailer", "own",
        post("0\r\nHost: evil.test\r\n\r\n", *H2C, "Transfer-Encoding: chunked"), (), BAD, UPGRADE,
    ),
    Case(
        "upgrade and close", "own",
        post("abc", "Connection: close, upgrade", "Upgrade: h2c", "Content-Length: 3") + NEXT,
        (ABC,), CLOSE, UPGRADE,
    ),
    Case(
        "upgrade in HTTP/1.0", "own", message("GET /1 HTTP/1.0", *H2C) + NEXT, (got("/1"),), CLOSE,
        UPGRADE,
    ),
    Case("end in the method", "own", b"GE", (), CUT),
    Case("end in a name", "llhttp finish", b"PUT /x HTTP/1.1\r\nContent-Leng", (), CUT),
    Case("end after a line", "gunicorn invalid/001", b"GET /x HTTP/1.0\r\nabc", (), CUT),
    Case("end in the body", "llhttp finish", sized(" 100"), (), CUT),
    Case(
        "end after a complete request", "llhttp finish", get("/1") + b"GET /2 HT", (got("/1"),),
        CUT,
    ),
]

# fmt: on

CASES = [*REQUEST_LINES, *TARGETS, *FIELDS, *BODIES, *CHUNKS, *CONNECTIONS]
