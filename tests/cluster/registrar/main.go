// registrar tells kubelet of a CSI plugin, as node-driver-registrar does, which is in no public module
// proxy that every builder reaches. It takes the same options.
package main

import (
	"context"
	"flag"
	"log"
	"net"
	"os"
	"path/filepath"
	"time"

	csi "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

var (
	address  = flag.String("csi-address", "/run/csi/socket", "the plugin's socket, as it is seen here")
	endpoint = flag.String("kubelet-registration-path", "", "the plugin's socket, as kubelet sees it")
	folder   = flag.String("plugin-registration-path", "/registration", "where kubelet looks for plugins")
)

type server struct {
	registration.UnimplementedRegistrationServer
	driver string
}

func (s server) GetInfo(context.Context, *registration.InfoRequest) (*registration.PluginInfo, error) {
	return &registration.PluginInfo{
		Type:              registration.CSIPlugin,
		Name:              s.driver,
		Endpoint:          *endpoint,
		SupportedVersions: []string{"1.0.0"},
	}, nil
}

func (s server) NotifyRegistrationStatus(
	_ context.Context, status *registration.RegistrationStatus,
) (*registration.RegistrationStatusResponse, error) {
	if !status.PluginRegistered {
		// Whoever runs this starts it again, and kubelet asks anew.
		log.Fatalf("kubelet did not register %s: %s", s.driver, status.Error)
	}
	log.Printf("kubelet has registered %s", s.driver)
	return &registration.RegistrationStatusResponse{}, nil
}

// driver asks the plugin for its name, until it answers.
func driver() string {
	connection, err := grpc.NewClient("unix:"+*address,
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"))
	if err != nil {
		log.Fatalf("cannot use %s: %v", *address, err)
	}
	defer connection.Close()
	for {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		info, err := csi.NewIdentityClient(connection).GetPluginInfo(ctx, &csi.GetPluginInfoRequest{})
		cancel()
		if err == nil {
			return info.GetName()
		}
		log.Printf("the plugin does not answer yet: %v", err)
		time.Sleep(200 * time.Millisecond)
	}
}

func main() {
	// The real one's options for its log.
	flag.Int("v", 0, "ignored")
	flag.Duration("timeout", 0, "ignored")
	flag.String("http-endpoint", "", "ignored")
	flag.Parse()
	name := driver()
	socket := filepath.Join(*folder, name+"-reg.sock")
	os.Remove(socket)
	listener, err := net.Listen("unix", socket)
	if err != nil {
		log.Fatalf("cannot listen: %v", err)
	}
	serving := grpc.NewServer()
	registration.RegisterRegistrationServer(serving, server{driver: name})
	log.Fatal(serving.Serve(listener))
}
