from meshproxy.cli.dev import dev_settings
from meshproxy.config import Secret
from meshproxy.simulator.behaviour import TRAITS
from meshproxy.simulator.dialects import DIALECTS


def settings(**env):
    return dev_settings(redis_url="unix:///s", simulator_url="http://127.0.0.1:9/v1", port=8080, env=env)


def routes(found, model):
    return [(route.upstream, route.model) for route in found.models[model].upstreams]


def plain(found):
    """The upstreams but those for a dialect's settings."""
    return [name for name in found.upstreams if not name.startswith("dialect-")]


def test_the_simulator_serves_everything_without_keys():
    found = settings()
    assert plain(found) == ["simulator"]
    assert (found.server.listen, found.server.admin_listen) == ("127.0.0.1:8080", "127.0.0.1:8081")
    assert found.defaults.model == "openai/gpt-4o"
    assert routes(found, "openai/gpt-4o") == [("simulator", "gpt-4o")]
    assert routes(found, "sim/default") == [("simulator", "sim/plain")]
    assert [name for name in TRAITS if f"sim/{name}" not in found.models] == []


def test_each_dialect_has_the_settings_that_it_needs():
    found = settings()
    served = {name: found.upstreams[routes(found, f"sim/dialect-{name}")[0][0]] for name in DIALECTS}
    needed = {name: dialect.upstream for name, dialect in DIALECTS.items()}
    assert {name: {key: getattr(served[name], key) for key in needed[name]} for name in DIALECTS} == needed


def test_a_real_provider_serves_its_own_models():
    found = settings(OPENAI_API_KEY="sk-x", OPENROUTER_API_KEY="")
    assert plain(found) == ["simulator", "openai"]
    assert found.upstreams["openai"].api_key == Secret(env="OPENAI_API_KEY")
    assert found.defaults.model == "sim/default"
    assert routes(found, "openai/gpt-4.1") == [("openai", "gpt-4.1")]


def test_openrouter_comes_after_openai_and_keeps_the_maker_s_name():
    found = settings(OPENAI_API_KEY="sk-x", OPENROUTER_API_KEY="sk-y")
    assert routes(found, "openai/gpt-4o") == [("openai", "gpt-4o"), ("openrouter", "openai/gpt-4o")]
    assert found.upstreams["openrouter"].kind == "openrouter"


def test_free_ports():
    found = dev_settings(redis_url="unix:///s", simulator_url="http://127.0.0.1:9/v1", port=0, env={})
    assert (found.server.listen, found.server.admin_listen) == ("127.0.0.1:0", "127.0.0.1:0")
