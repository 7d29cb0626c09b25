"""TLS on the data listener. One context for the listener's life: a renewed certificate is loaded into it, and the next
handshake shows it.
"""

import ssl

from meshproxy.config import Server, Unfit

HANDSHAKE_S = 10.0


def server_context(server: Server) -> ssl.SSLContext | None:
    """The context that the settings ask for, if they ask for one; Unfit if the files are no use."""
    if server.tls_cert is None or server.tls_key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    load_certificate(context, server)
    return context


def load_certificate(context: ssl.SSLContext, server: Server) -> None:
    """Show this certificate from now on; Unfit, and nothing has changed, if the files are no use."""
    if server.tls_cert is None or server.tls_key is None:
        return
    try:
        context.load_cert_chain(server.tls_cert, server.tls_key, password=_no_password)
    except ssl.SSLError as error:
        raise Unfit([f"server.tls_cert: {server.tls_cert} and {server.tls_key}: {_words(error)}"]) from error
    except OSError as error:
        raise Unfit(
            [f"server.tls_cert: {server.tls_cert} or {server.tls_key} can't be read ({error.strerror})"]
        ) from error
    except ValueError as error:
        raise Unfit([f"server.tls_key: {error}"]) from error


def _no_password() -> str:
    """OpenSSL would ask on the terminal."""
    raise ValueError("a key with a password can't be used")


def _words(error: ssl.SSLError) -> str:
    return (error.reason or "not PEM").replace("_", " ").lower()
