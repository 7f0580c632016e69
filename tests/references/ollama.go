// What Ollama sends to a model: Go's own text/template with the data that Ollama gives it, as published in its
// template/template.go, api/types.go and parser/parser.go. It reads a JSON list of {modelfile, messages, tools} and
// writes a JSON list of {text, error}.
package main

import (
	"bytes"
	"encoding/json"
	"os"
	"strconv"
	"strings"
	"text/template"
)

type arguments map[string]any // a template gets a map, whose keys JSON sorts

func (a arguments) String() string {
	out, err := json.Marshal(a)
	if err != nil {
		panic(err)
	}
	return string(out)
}

type property struct {
	Type        any    `json:"type,omitempty"`
	Items       any    `json:"items,omitempty"`
	Description string `json:"description,omitempty"`
	Enum        []any  `json:"enum,omitempty"`
}

type toolFunction struct {
	Name        string `json:"name"`
	Description string `json:"description,omitempty"`
	Parameters  struct {
		Type       string              `json:"type"`
		Required   []string            `json:"required,omitempty"`
		Properties map[string]property `json:"properties"`
	} `json:"parameters"`
}

type tool struct {
	Type     string       `json:"type"`
	Function toolFunction `json:"function"`
}

func (t tool) String() string {
	out, _ := json.Marshal(t)
	return string(out)
}

type toolCall struct {
	Function struct {
		Name      string    `json:"name"`
		Arguments arguments `json:"arguments"`
	} `json:"function"`
}

type message struct {
	Role      string     `json:"role"`
	Content   string     `json:"content"`
	ToolCalls []toolCall `json:"tool_calls"`
}

type request struct {
	Modelfile string    `json:"modelfile"`
	Messages  []message `json:"messages"`
	Tools     []tool    `json:"tools"`
}

type answer struct {
	Text  string `json:"text"`
	Error string `json:"error"`
}

// The TEMPLATE of a Modelfile: the reader keeps blanks, line breaks and what Go calls printable.
func templateOf(modelfile string) string {
	var kept strings.Builder
	for _, r := range modelfile {
		if r == ' ' || r == '\t' || r == '\n' || r == '\r' || strconv.IsPrint(r) {
			kept.WriteRune(r)
		}
	}
	_, rest, _ := strings.Cut(kept.String(), "\nTEMPLATE \"\"\"")
	text, _, _ := strings.Cut(rest, "\"\"\"")
	return text
}

func render(one request) (string, error) {
	functions := template.FuncMap{"json": func(value any) string {
		out, _ := json.Marshal(value)
		return string(out)
	}}
	parsed, err := template.New("").Option("missingkey=zero").Funcs(functions).Parse(templateOf(one.Modelfile))
	if err != nil {
		return "", err
	}
	var system []string
	var collated []*message
	for i := range one.Messages {
		this := &one.Messages[i]
		if this.Role == "system" {
			system = append(system, this.Content)
		}
		if n := len(collated); n > 0 && collated[n-1].Role == this.Role && this.Role != "tool" {
			collated[n-1].Content += "\n\n" + this.Content
		} else {
			collated = append(collated, this)
		}
	}
	var out bytes.Buffer
	err = parsed.Execute(&out, map[string]any{
		"System": strings.Join(system, "\n\n"), "Messages": collated, "Tools": one.Tools, "Response": "",
		"Think": false, "IsThinkSet": false,
	})
	return out.String(), err
}

func main() {
	var requests []request
	if err := json.NewDecoder(os.Stdin).Decode(&requests); err != nil {
		panic(err)
	}
	answers := make([]answer, len(requests))
	for i, one := range requests {
		text, err := render(one)
		if err != nil {
			answers[i].Error = err.Error()
		} else {
			answers[i].Text = text
		}
	}
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(answers); err != nil {
		panic(err)
	}
}
