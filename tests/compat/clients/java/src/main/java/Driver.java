import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.node.ObjectNode;
import com.openai.client.OpenAIClient;
import com.openai.client.okhttp.OpenAIOkHttpClient;
import com.openai.core.JsonValue;
import com.openai.core.http.StreamResponse;
import com.openai.errors.OpenAIServiceException;
import com.openai.models.FunctionDefinition;
import com.openai.models.FunctionParameters;
import com.openai.models.chat.completions.ChatCompletion;
import com.openai.models.chat.completions.ChatCompletionChunk;
import com.openai.models.chat.completions.ChatCompletionCreateParams;
import com.openai.models.chat.completions.ChatCompletionStreamOptions;
import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.util.Iterator;
import java.util.List;
import java.util.Map;

/** A client written for Java, driven by lines of JSON: see ../README.md for the lines. */
public final class Driver {
    private static final ObjectMapper JSON = new ObjectMapper();

    private Driver() {}

    public static void main(String[] args) throws Exception {
        BufferedReader lines = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
        PrintStream answers = new PrintStream(System.out, true, StandardCharsets.UTF_8);
        for (String line = lines.readLine(); line != null; line = lines.readLine()) {
            ObjectNode said = JSON.createObjectNode();
            try {
                answer(JSON.readTree(line), said);
            } catch (RuntimeException error) {
                told(error, said.putObject("error"));
            }
            answers.println(JSON.writeValueAsString(said));
        }
        System.exit(0); // OkHttp's threads would linger
    }

    private static void answer(JsonNode ask, ObjectNode said) throws Exception {
        OpenAIOkHttpClient.Builder builder = OpenAIOkHttpClient.builder()
                .baseUrl(ask.get("base_url").asText())
                .apiKey(ask.get("key").asText());
        if (!ask.get("retries").asBoolean()) builder.maxRetries(0);
        OpenAIClient client = builder.build();
        ChatCompletionCreateParams.Builder params = ChatCompletionCreateParams.builder()
                .model(ask.get("model").asText())
                .addUserMessage(ask.get("words").asText());
        try {
            switch (ask.get("do").asText()) {
                case "whole" -> whole(client, params, said);
                case "tools" -> tools(client, params, said);
                case "stream" -> stream(client, params, said, false);
                default -> stream(client, params, said, true);
            }
        } finally {
            client.close();
        }
    }

    private static void whole(OpenAIClient client, ChatCompletionCreateParams.Builder params, ObjectNode said) {
        ChatCompletion completion = client.chat().completions().create(params.build());
        said.put("text", completion.choices().get(0).message().content().orElse(null));
        said.put("total", completion.usage().orElseThrow().totalTokens());
    }

    private static void stream(
            OpenAIClient client, ChatCompletionCreateParams.Builder params, ObjectNode said, boolean leave) {
        params.streamOptions(ChatCompletionStreamOptions.builder().includeUsage(true).build());
        StringBuilder text = new StringBuilder();
        try (StreamResponse<ChatCompletionChunk> stream =
                client.chat().completions().createStreaming(params.build())) {
            for (Iterator<ChatCompletionChunk> chunks = stream.stream().iterator(); chunks.hasNext(); ) {
                ChatCompletionChunk chunk = chunks.next();
                chunk.usage().ifPresent(usage -> said.put("total", usage.totalTokens()));
                chunk.choices().forEach(choice -> choice.delta().content().ifPresent(text::append));
                if (leave && !text.isEmpty()) break;
            }
        } finally {
            said.put("text", text.toString());
        }
    }

    private static void tools(OpenAIClient client, ChatCompletionCreateParams.Builder params, ObjectNode said)
            throws Exception {
        params.addFunctionTool(FunctionDefinition.builder()
                .name("get_weather")
                .description("The weather in a city.")
                .parameters(FunctionParameters.builder()
                        .putAdditionalProperty("type", JsonValue.from("object"))
                        .putAdditionalProperty(
                                "properties", JsonValue.from(Map.of("city", Map.of("type", "string"))))
                        .putAdditionalProperty("required", JsonValue.from(List.of("city")))
                        .build())
                .build());
        ChatCompletion completion = client.chat().completions().create(params.build());
        var call = completion.choices().get(0).message().toolCalls().orElseThrow().get(0).asFunction().function();
        said.put("name", call.name());
        said.set("arguments", JSON.readTree(call.arguments()));
    }

    private static void told(RuntimeException error, ObjectNode told) {
        if (error instanceof OpenAIServiceException answered) {
            told.put("status", answered.statusCode());
            told.put("code", answered.code().orElse(null));
        }
        told.put("message", String.valueOf(error.getMessage()));
    }
}
