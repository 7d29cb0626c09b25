//! A client written for Rust, driven by lines of JSON: see ../../README.md for the lines.

use std::io::{self, BufRead, Write};

use async_openai::config::OpenAIConfig;
use async_openai::error::OpenAIError;
use async_openai::middleware::ReqwestService;
use async_openai::types::chat::{ChatCompletionMessageToolCalls, CreateChatCompletionRequest};
use async_openai::Client;
use futures::StreamExt;
use serde_json::{json, Value};

#[tokio::main(flavor = "current_thread")]
async fn main() {
    for line in io::stdin().lock().lines() {
        let ask: Value = serde_json::from_str(&line.unwrap()).unwrap();
        let said = match ask["do"].as_str().unwrap() {
            "whole" => whole(&ask).await,
            "tools" => tools(&ask).await,
            "stream" => stream(&ask, false).await,
            _ => stream(&ask, true).await,
        };
        println!("{}", said.unwrap_or_else(|error| json!({ "error": told(&error) })));
        io::stdout().flush().unwrap();
        tokio::task::yield_now().await;
    }
}

fn client(ask: &Value) -> Client<OpenAIConfig> {
    let config = OpenAIConfig::new()
        .with_api_base(ask["base_url"].as_str().unwrap())
        .with_api_key(ask["key"].as_str().unwrap());
    let client = Client::with_config(config);
    match ask["retries"].as_bool() {
        Some(true) => client,
        _ => client.with_http_service(ReqwestService::new(reqwest::Client::new())),
    }
}

fn request(ask: &Value, more: Value) -> CreateChatCompletionRequest {
    let mut fields = json!({ "model": ask["model"], "messages": [{ "role": "user", "content": ask["words"] }] });
    fields.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    serde_json::from_value(fields).unwrap()
}

async fn whole(ask: &Value) -> Result<Value, OpenAIError> {
    let completion = client(ask).chat().create(request(ask, json!({}))).await?;
    let usage = completion.usage.unwrap();
    Ok(json!({ "text": completion.choices[0].message.content, "total": usage.total_tokens }))
}

async fn stream(ask: &Value, leave: bool) -> Result<Value, OpenAIError> {
    let more = json!({ "stream": true, "stream_options": { "include_usage": true } });
    let mut stream = client(ask).chat().create_stream(request(ask, more)).await?;
    let (mut text, mut said) = (String::new(), json!({ "total": null }));
    while let Some(chunk) = stream.next().await {
        match chunk {
            Ok(chunk) => {
                if let Some(usage) = chunk.usage {
                    said["total"] = json!(usage.total_tokens);
                }
                for choice in chunk.choices {
                    text += &choice.delta.content.unwrap_or_default();
                }
            }
            Err(error) => {
                said["error"] = told(&error);
                break;
            }
        }
        if leave && !text.is_empty() {
            break;
        }
    }
    said["text"] = json!(text);
    drop(stream);
    if leave {
        // The program blocks in its next read: the runtime has to run once more for the connection to be closed.
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    Ok(said)
}

async fn tools(ask: &Value) -> Result<Value, OpenAIError> {
    let parameters = json!({ "type": "object", "properties": { "city": { "type": "string" } }, "required": ["city"] });
    let tool = json!({
        "type": "function",
        "function": { "name": "get_weather", "description": "The weather in a city.", "parameters": parameters }
    });
    let completion = client(ask).chat().create(request(ask, json!({ "tools": [tool] }))).await?;
    match &completion.choices[0].message.tool_calls.as_ref().unwrap()[0] {
        ChatCompletionMessageToolCalls::Function(call) => {
            let arguments: Value = serde_json::from_str(&call.function.arguments).unwrap();
            Ok(json!({ "name": call.function.name, "arguments": arguments }))
        }
        _ => panic!("not a function"),
    }
}

fn told(error: &OpenAIError) -> Value {
    match error {
        OpenAIError::ApiError(answered) => json!({
            "status": answered.status_code.as_u16(),
            "code": answered.api_error.code,
            "message": error.to_string(),
        }),
        _ => json!({ "status": null, "code": null, "message": error.to_string() }),
    }
}
