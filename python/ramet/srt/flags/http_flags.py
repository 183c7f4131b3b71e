"""Owns the flags of the HTTP server."""

from dataclasses import dataclass

from ramet.srt.flags.flag import COUNT, PORT, SECONDS, flag


@dataclass(frozen=True, kw_only=True)
class HttpFlags:
    """Where users are served, and which of them."""

    host: str = flag("127.0.0.1", "Address that the HTTP server and the engine-info bootstrap server bind to.")
    port: int = flag(30000, "Port of the HTTP server.", limit=PORT)
    api_key: str | None = flag(None, "Bearer key that every API call needs, except the health checks.")
    admin_api_key: str | None = flag(
        None,
        "Bearer key for administrative calls (flush_cache, profiles, adapters, abort_request of all) and registering "
        "weights.",
    )
    ssl_certfile: str | None = flag(
        None, "File with the server's certificate (PEM), and those that lead to its authority: users come by https."
    )
    ssl_keyfile: str | None = flag(
        None, "File with the certificate's private key (PEM); where not given it stands in --ssl-certfile."
    )
    ssl_keyfile_password: str | None = flag(None, "Password of the private key.")
    ssl_ca_certs: str | None = flag(
        None,
        "File with the certificates (PEM) that other instances at https:// are verified with; the system's when not "
        "given.",
    )
    allowed_hosts: str | None = flag(
        None,
        "Names by which web pages and proxies may call a server without a key, besides its own: joined by commas, or * "
        "for all.",
    )
    cors_allow_origins: tuple[str, ...] = flag(
        (),
        "Sites whose pages may call the API and read its answers, each as in https://ui.example or "
        "http://localhost:8080; * for all.",
        several=True,
    )
    root_path: str = flag(
        "",
        "Path below which a proxy shows the server, as in /llm: it may take it off requests or leave it on.",
        aliases=("--fastapi-root-path",),
    )
    max_connections: int = flag(
        4096, "Most connections to the HTTP server; those that wait for a request make room for new ones.", limit=COUNT
    )
    profile_dir: str | None = flag(
        None,
        "Folder below which /start_profile lets a caller choose one; without it callers choose none, and traces go to "
        "$RAMET_TORCH_PROFILER_DIR, or a folder of this user's in /tmp.",
    )
    drain_timeout: float = flag(30.0, "Seconds that running requests may take to end after SIGTERM.", limit=SECONDS)
