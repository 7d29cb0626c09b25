// A client written for Go, driven by lines of JSON: see ../README.md for the lines.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"os"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"
	"github.com/openai/openai-go/v3/shared"
)

type ask struct {
	BaseURL string `json:"base_url"`
	Key     string `json:"key"`
	Model   string `json:"model"`
	Words   string `json:"words"`
	Do      string `json:"do"`
	Retries bool   `json:"retries"`
}

type said map[string]any

func (a ask) client() openai.Client {
	options := []option.RequestOption{option.WithBaseURL(a.BaseURL), option.WithAPIKey(a.Key)}
	if !a.Retries {
		options = append(options, option.WithMaxRetries(0))
	}
	return openai.NewClient(options...)
}

func (a ask) params() openai.ChatCompletionNewParams {
	return openai.ChatCompletionNewParams{
		Model:    a.Model,
		Messages: []openai.ChatCompletionMessageParamUnion{openai.UserMessage(a.Words)},
	}
}

func (a ask) whole() said {
	client := a.client()
	completion, err := client.Chat.Completions.New(context.Background(), a.params())
	if err != nil {
		return said{"error": told(err)}
	}
	return said{"text": completion.Choices[0].Message.Content, "total": completion.Usage.TotalTokens}
}

func (a ask) stream(leave bool) said {
	client, params := a.client(), a.params()
	params.StreamOptions = openai.ChatCompletionStreamOptionsParam{IncludeUsage: openai.Bool(true)}
	stream := client.Chat.Completions.NewStreaming(context.Background(), params)
	defer stream.Close()
	text, answer := "", said{}
	for stream.Next() {
		chunk := stream.Current()
		if chunk.JSON.Usage.Valid() {
			answer["total"] = chunk.Usage.TotalTokens
		}
		for _, choice := range chunk.Choices {
			text += choice.Delta.Content
		}
		if leave && text != "" {
			break
		}
	}
	answer["text"] = text
	if err := stream.Err(); err != nil {
		answer["error"] = told(err)
	}
	return answer
}

func (a ask) tools() said {
	client, params := a.client(), a.params()
	params.Tools = []openai.ChatCompletionToolUnionParam{openai.ChatCompletionFunctionTool(shared.FunctionDefinitionParam{
		Name:        "get_weather",
		Description: openai.String("The weather in a city."),
		Parameters: shared.FunctionParameters{
			"type":       "object",
			"properties": map[string]any{"city": map[string]any{"type": "string"}},
			"required":   []string{"city"},
		},
	})}
	completion, err := client.Chat.Completions.New(context.Background(), params)
	if err != nil {
		return said{"error": told(err)}
	}
	call := completion.Choices[0].Message.ToolCalls[0].Function
	return said{"name": call.Name, "arguments": json.RawMessage(call.Arguments)}
}

func told(err error) said {
	var answered *openai.Error
	if errors.As(err, &answered) {
		return said{"status": answered.StatusCode, "code": answered.Code, "message": err.Error(), "inside": answered.Message}
	}
	return said{"status": nil, "code": nil, "message": err.Error()}
}

func main() {
	lines := bufio.NewScanner(os.Stdin)
	answers := json.NewEncoder(os.Stdout)
	for lines.Scan() {
		var a ask
		if err := json.Unmarshal(lines.Bytes(), &a); err != nil {
			panic(err)
		}
		var answer said
		switch a.Do {
		case "whole":
			answer = a.whole()
		case "stream":
			answer = a.stream(false)
		case "hang_up":
			answer = a.stream(true)
		case "tools":
			answer = a.tools()
		}
		if err := answers.Encode(answer); err != nil {
			panic(err)
		}
	}
}
